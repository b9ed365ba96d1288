"""Context coherence without sending keys and values: every rank computes every token, and what travels are sums.

In each MoE layer a rank runs its share of the experts for all tokens and sends the partial sums to the others.
Then all have the token's hidden state, and with it compute the keys and values themselves: the context is
everywhere, no token goes out before its experts run, and a layer costs one link delay. Every rank knows every
route, so nobody counts either. Where keys and values are as wide as the hidden state, this sends less than sending
those (`coherent.py`); the price is that attention runs on every rank.

Ranks must compute alike to the bit, which machines of one kind do; a check of the routes in each message finds those
that do not.

Shape alphabet: T tokens of the step, K choices, H hidden, G ranks.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from expert_cache.cache import ExpertCache
from moe_serve.parallel.exchange import pack, unpack
from moe_serve.parallel.sharing import LossNotes, SharedLayers, share_of

Rows = tuple[torch.Tensor, torch.Tensor]
"""Rows [n] whose sums are whole, and rows [m] of which other ranks have parts too."""
CHECK_BYTES = 4
NOBODY = -1
"""Stands for the rank of a choice that need not be sent for: all run it, or none."""


class RanksDivergedError(RuntimeError):
    """Two ranks computed different routes for the same tokens: the ranks start again."""


@dataclass(frozen=True, slots=True)
class Visits:
    """Who runs experts for a token and who needs the sum, in one layer."""

    runs: torch.Tensor
    """[T, G] bool: ranks that run some of its experts, for all who need the sum."""
    needs: torch.Tensor
    """[T, G] bool."""

    def rows(self, source: int, target: int) -> Rows:
        """Rows that one rank sends to another: those finished there, and those of which others have parts."""
        sent = self.runs[:, source] & self.needs[:, target]
        is_whole = self.runs.sum(1) == 1
        return (sent & is_whole).nonzero()[:, 0], (sent & ~is_whole).nonzero()[:, 0]


class RecomputingLayers:
    """Stands where ExpertLayers stood; every rank calls it with the same tokens."""

    def __init__(self, shared: SharedLayers, losses: LossNotes, last_layer: int) -> None:
        """`last_layer`: the model's last decoder layer."""
        self._shared = shared
        self._losses = losses
        self._last_layer = last_layer
        # A token that everyone runs alone must not fail on one rank only: a cache's reads can.
        self._runs_alone = not isinstance(shared.local.experts, ExpertCache)
        self._homes = torch.empty(0, dtype=torch.int64)
        self._sampled = torch.empty(0, dtype=torch.bool)

    def begin(self, homes: torch.Tensor, sampled: torch.Tensor) -> None:
        """`homes` [T]: the rank that each token is booked on and may be sampled on; `sampled`: rows to sample."""
        self._homes = homes
        self._sampled = torch.zeros(len(homes), dtype=torch.bool, device=homes.device)
        self._sampled[sampled] = True

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As ExpertLayers.run: hidden [T, H]; ids, weights [T, K] -> [T, H]. After the last decoder layer only the
        homes of sampled tokens need them, and only those rows are computed."""
        shared, me = self._shared, self._shared.exchange.rank
        is_last = layer == self._last_layer
        ranks = shared.ownership.agree(layer, ids, self._homes if is_last else None)
        at_all = torch.zeros_like(self._sampled)
        if self._runs_alone and not is_last:
            at_all = shared.ownership.everywhere(layer, ids)
        mine = self._homes == me
        shared.count(layer, torch.where(at_all[:, None], me, ranks)[mine], me)
        ranks = torch.where(at_all[:, None] | (is_last & ~self._sampled)[:, None], NOBODY, ranks)
        weights = weights.to(torch.float32)
        partial = shared.run_share(layer, hidden, share_of(ids, ranks, me), weights, self._losses, num_own=0)
        self._losses.note(torch.arange(len(partial), device=partial.device), partial, me)
        total = self._sum(layer, self._visits(ranks, is_last), partial, hidden.dtype, ids)
        if at_all.any():  # by themselves, because results depend on what is computed beside them
            total[at_all] = shared.run_share(layer, hidden[at_all], ids[at_all], weights[at_all], self._losses)
        return total.to(hidden.dtype)

    def _visits(self, ranks: torch.Tensor, is_last: bool) -> Visits:
        """`ranks` [T, K]: where choices run whose sums are sent."""
        every_rank = torch.arange(self._shared.exchange.num_ranks, device=ranks.device)
        runs = (ranks[:, :, None] == every_rank).any(1)
        needs = self._homes[:, None] == every_rank if is_last else torch.ones_like(runs)
        return Visits(runs, needs)

    def _sum(
        self, layer: int, visits: Visits, partial: torch.Tensor, dtype: torch.dtype, ids: torch.Tensor
    ) -> torch.Tensor:
        """Partial sums of all ranks, in the order of ranks, so that all get the same bits."""
        arrived = self._trade(layer, visits, partial, dtype, _check_of(ids))
        total = torch.zeros_like(partial)
        for rank in range(self._shared.exchange.num_ranks):
            if rank == self._shared.exchange.rank:
                total += partial
            elif rank in arrived:
                rows, theirs = arrived[rank]
                self._losses.note(rows, theirs, rank)
                total.index_add_(0, rows, theirs)
        return total

    def _trade(
        self, layer: int, visits: Visits, partial: torch.Tensor, dtype: torch.dtype, check: torch.Tensor
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By rank, the rows that it had a part in and that part [n, H]."""
        exchange, index = self._shared.exchange, self._shared.index(layer)
        leaving = {r: visits.rows(exchange.rank, r) for r in exchange.others}
        outgoing = {r: _pack(rows, partial, dtype, check) for r, rows in leaving.items() if any(map(len, rows))}
        exchange.book(index, "control", CHECK_BYTES * len(outgoing))
        exchange.book(index, "combine", sum(len(raw) - CHECK_BYTES for raw in outgoing.values()))
        coming = {r: visits.rows(r, exchange.rank) for r in exchange.others}
        expected = {r: rows for r, rows in coming.items() if any(map(len, rows))}
        raws = exchange.trade(index, outgoing, expected)
        return {r: (torch.cat(rows), _unpack(raws[r], r, rows, partial, dtype, check)) for r, rows in expected.items()}


def _check_of(ids: torch.Tensor) -> torch.Tensor:
    """[CHECK_BYTES] uint8 that differ when the routes do."""
    digest = zlib.crc32(ids.cpu().numpy().tobytes()).to_bytes(CHECK_BYTES, "big")
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(ids.device)


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
            " use --ep-context send or --ep-mode conventional"
        )
    sections = torch.split(raw[CHECK_BYTES:], [whole_bytes, part_bytes])
    (whole,), (parts,) = (unpack(raw, (width, t)) for raw, t in zip(sections, (dtype, like.dtype), strict=True))
    return torch.cat([whole.to(like.dtype), parts])
