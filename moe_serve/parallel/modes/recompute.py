"""Coherent expert parallelism by recomputation: every rank computes every token, and only experts' sums are sent.

In each MoE layer a rank runs its share of the experts for all tokens and sends the partial sums to the others.
Then all have the token's hidden state, and compute its next keys and values from it themselves. No token goes out
before its experts run, so a layer costs one link delay. Every rank knows all routes, so no sizes are exchanged.
The price is that attention runs on every rank.

Ranks must compute alike to the bit, which machines of one kind do; a check of the routes in each message finds those
that do not.

Shape alphabet: T tokens of the step, K choices, H hidden, G ranks.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from expert_cache.running.experts import Work, nothing
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution import forward_batch
from moe_serve.execution.forward_batch import GroupLimits
from moe_serve.hf.experts import connect, moe_layers
from moe_serve.parallel.modes.copies import Bools, Ints, visits
from moe_serve.parallel.modes.exchange import pack, unpack
from moe_serve.parallel.modes.expert_share import ExpertShare, LossNotes, SharedExperts, share_of
from moe_serve.parallel.modes.route_pieces import begin_step, taken
from moe_serve.parallel.modes.runner import Outcome, RankStep
from moe_serve.parallel.modes.step_rows import errors_of, home_ranks, sample_rows
from predictors.shape import MoELayer

Rows = tuple[torch.Tensor, torch.Tensor]
"""Rows [n] with whole sums, and rows [m] with sums that have parts on other ranks."""
CHECK_BYTES = 4
NO_RANK = -1
"""In place of a choice's rank where its sum is not sent: all ranks run it, or none."""


class RanksDivergedError(RuntimeError):
    """Two ranks computed different routes for the same tokens: the ranks start again."""


class Visits:
    """Who runs experts for a token and who needs the sum, in one layer."""

    def __init__(self, runs: Bools, needs: Bools, device: torch.device) -> None:
        """`runs` [T, G]: ranks that run some of a token's experts, for all who need the sum, `needs` [T, G]."""
        self._runs = runs
        self._needs = needs
        self._is_whole = runs.sum(1) == 1
        self._device = device

    def rows(self, source: int, target: int) -> Rows:
        """Rows that one rank sends to another."""
        sent = self._runs[:, source] & self._needs[:, target]
        whole, parts = (sent & self._is_whole).nonzero()[0], (sent & ~self._is_whole).nonzero()[0]
        return torch.from_numpy(whole).to(self._device), torch.from_numpy(parts).to(self._device)


class RecomputingExperts(SharedExperts):
    """Experts over ranks; every rank calls them with the same tokens. Routes are looked at on the host."""

    def __init__(self, shared: ExpertShare, last_layer: MoELayer | None) -> None:
        """`last_layer`: of the model's last decoder layer, if that has experts."""
        super().__init__(shared)
        self._last_layer = last_layer
        # A token that all ranks run alone must not fail on one of them only.
        self._runs_alone = not shared.local.reads_can_fail
        self._homes = np.empty(0, np.int64)
        self._sampled = np.empty(0, np.bool_)

    def begin(self, homes: torch.Tensor, sampled: torch.Tensor) -> None:
        """`homes` [T]: the rank that each token is booked on and may be sampled on; `sampled`: rows to sample."""
        self._homes = homes.cpu().numpy()
        self._sampled = np.zeros(len(homes), np.bool_)
        self._sampled[sampled.cpu().numpy()] = True

    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """See Experts. After the last decoder layer only the homes of sampled tokens need the sums, and only those
        rows are computed."""
        self.routes.add(ids, weights)
        meanwhile()
        shared, me = self.shared, self.shared.exchange.rank
        is_last = layer == self._last_layer
        routes, weights = ids.cpu().numpy(), weights.to(torch.float32)
        ranks = shared.ownership.agree(layer, routes, self._homes if is_last else None)
        by_all = np.zeros_like(self._sampled)
        if self._runs_alone and not is_last:
            by_all = shared.ownership.everywhere(layer, routes)
        ranks[by_all] = me
        shared.count(layer, torch.from_numpy(ranks[self._homes == me]), me)
        ranks[~self._sampled if is_last else by_all] = NO_RANK
        partial = self._share(layer, hidden, ids, torch.from_numpy(ranks).to(ids.device), weights)
        total = self._sum(layer, self._visits(ranks, is_last, ids.device), partial, hidden.dtype, routes)
        if by_all.any():  # by themselves, because results depend on what is computed beside them
            rows = torch.from_numpy(by_all.nonzero()[0]).to(ids.device)
            total[rows] = shared.run_share(layer, hidden[rows], ids[rows], weights[rows], self.losses)
        return total.to(hidden.dtype)

    def _share(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, ranks: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Partial sums [T, H] of the choices that `ranks` [T, K] gives to this rank; NaN where one cannot be read."""
        notes = LossNotes()
        ours = share_of(ids, ranks, self.shared.exchange.rank)
        partial = self.shared.run_share(layer, hidden, ours, weights, notes)
        for row, error in notes.take().items():
            partial[row] = float("nan")
            self.losses.add(row, error)
        return partial

    def _visits(self, ranks: Ints, is_last: bool, device: torch.device) -> Visits:
        """`ranks` [T, K]: where choices run whose sums are sent."""
        num_ranks = self.shared.exchange.num_ranks
        runs = visits(ranks, num_ranks)
        needs = self._homes[:, None] == np.arange(num_ranks) if is_last else np.ones_like(runs)
        return Visits(runs, needs, device)

    def _sum(
        self, layer: MoELayer, who: Visits, partial: torch.Tensor, dtype: torch.dtype, routes: Ints
    ) -> torch.Tensor:
        """Partial sums of all ranks, in the order of ranks, so that all get the same bits."""
        arrived = self._trade(layer, who, partial, dtype, _check_of(routes).to(partial.device))
        total = torch.zeros_like(partial)
        for rank in range(self.shared.exchange.num_ranks):
            if rank == self.shared.exchange.rank:
                total += partial
            elif rank in arrived:
                rows, theirs = arrived[rank]
                self.losses.note(rows, theirs, rank)
                total.index_add_(0, rows, theirs)
        return total

    def _trade(
        self, layer: MoELayer, who: Visits, partial: torch.Tensor, dtype: torch.dtype, check: torch.Tensor
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By rank, the rows that it had a part in and that part [n, H]."""
        exchange = self.shared.exchange
        leaving = {r: who.rows(exchange.rank, r) for r in exchange.others}
        outgoing = {r: _pack(rows, partial, dtype, check) for r, rows in leaving.items() if any(map(len, rows))}
        exchange.book(layer, "control", CHECK_BYTES * len(outgoing))
        exchange.book(layer, "combine", sum(len(raw) - CHECK_BYTES for raw in outgoing.values()))
        coming = {r: who.rows(r, exchange.rank) for r in exchange.others}
        expected = {r: rows for r, rows in coming.items() if any(map(len, rows))}
        raws = exchange.trade(layer, outgoing, expected)
        return {r: (torch.cat(rows), _unpack(raws[r], r, rows, partial, dtype, check)) for r, rows in expected.items()}


class RecomputingRunner:
    """All ranks walk through all tokens; a token is sampled at its home."""

    def __init__(self, runner: ModelRunner, shared: ExpertShare) -> None:
        self._runner = runner
        self._rank = shared.exchange.rank
        last_layer = moe_layers(runner.model).get(max(runner.kv_cache.layers))
        self._experts = runner.experts = RecomputingExperts(shared, last_layer)
        connect(runner.model, self._experts)

    def run(self, step: RankStep) -> Outcome:
        self._experts.between_steps()
        config, device = self._runner.config, self._runner.device
        batch = forward_batch.make(step.plan, config.kv.page_size, device, GroupLimits())
        homes = home_ranks(step, device)
        self._experts.begin(homes, batch.sample_rows)
        begin_step(self._experts.routes, step.routes)
        rows = batch.sample_rows[homes[batch.sample_rows] == self._rank]
        logits: torch.Tensor = self._runner.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=rows,
            forward_batch=batch,
            kv_cache=self._runner.kv_cache,
        ).logits[0]
        sampled, stuck, late = sample_rows(self._runner, step, batch, rows, logits)
        errors = errors_of(step, self._experts.losses) | stuck
        is_here = homes.cpu().numpy() == self._rank
        return Outcome(sampled, errors, taken(self._experts.routes, step.plan, is_here.nonzero()[0]), late)


def _check_of(routes: Ints) -> torch.Tensor:
    """[CHECK_BYTES] uint8 that differ when the routes do."""
    digest = zlib.crc32(routes.tobytes()).to_bytes(CHECK_BYTES, "big")
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _pack(rows: Rows, partial: torch.Tensor, dtype: torch.dtype, check: torch.Tensor) -> torch.Tensor:
    """Whole sums as the model's type, as they would end anyway; parts as they are."""
    whole, parts = rows
    return torch.cat([check, pack(partial[whole].to(dtype)).flatten(), pack(partial[parts]).flatten()])


def _unpack(
    raw: torch.Tensor, rank: int, rows: Rows, like: torch.Tensor, dtype: torch.dtype, check: torch.Tensor
) -> torch.Tensor:
    """[n, H] in the order of `rows`, of the type of `like`. RanksDivergedError."""
    width = like.shape[1]
    whole_bytes, part_bytes = len(rows[0]) * width * dtype.itemsize, len(rows[1]) * width * like.element_size()
    if len(raw) != CHECK_BYTES + whole_bytes + part_bytes or not torch.equal(raw[:CHECK_BYTES], check):
        raise RanksDivergedError(
            f"rank {rank} chose other experts for the same tokens: the devices do not compute alike;"
            " use --ep-mode conventional"
        )
    sections = torch.split(raw[CHECK_BYTES:], [whole_bytes, part_bytes])
    (whole,), (parts,) = (unpack(raw, (width, t)) for raw, t in zip(sections, (dtype, like.dtype), strict=True))
    return torch.cat([whole.to(like.dtype), parts])
