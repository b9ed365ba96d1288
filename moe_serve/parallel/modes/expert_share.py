"""ExpertShare: a MoE layer's experts divided among ranks: those of this rank, and the way to the others.

Sums are float32 and in the router's order, so that with two choices per token, wherever they run, the
bits are those of one rank; with more they differ by the rounding of a float32 sum.

Shape alphabet: T tokens, K choices, H hidden, L MoE layers, E experts, G ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.report import ExpertReport, ExpertTotals
from expert_cache.running.local_experts import RegroupedExperts
from expert_cache.storage.errors import ExpertReadError
from moe_serve.parallel.modes.exchange import Exchange
from moe_serve.parallel.modes.ownership import Ownership
from moe_serve.scheduling.batch_plan import BatchPlan
from placement.cost import Hosts
from predictors.shape import MoELayer

NOT_HERE = -1
"""Stands for the expert of a choice that another rank runs."""


def share_of(ids: torch.Tensor, ranks: torch.Tensor, rank: int) -> torch.Tensor:
    """ids [T, K] with NOT_HERE for the choices that `ranks` [T, K] sends elsewhere than to `rank`."""
    return torch.where(ranks == rank, ids, NOT_HERE)


class LossNotes:
    """Tokens of the steps since the last `take` that an unreadable expert made worthless.

    A rank that cannot read an expert answers another rank's token with NaN, which no later sum can hide.
    """

    def __init__(self) -> None:
        self._rows: dict[int, ExpertReadError] = {}

    def add(self, row: int, error: ExpertReadError) -> None:
        self._rows.setdefault(row, error)

    def note(self, rows: torch.Tensor, partial: torch.Tensor, rank: int) -> None:
        """Look at the partial sums [n, H] that rank sent for `rows` [n]."""
        for row in rows[partial[:, 0].isnan()].tolist():
            self.add(row, ExpertReadError(f"an expert of rank {rank} could not be read"))

    def take(self) -> dict[int, ExpertReadError]:
        rows, self._rows = self._rows, {}
        return rows


class ExpertShare:
    """One rank's experts, where the others are, and the way to them."""

    def __init__(
        self,
        local: RegroupedExperts[BatchPlan],
        hosts: Hosts,
        exchange: Exchange,
        top_k: int,
        like: torch.Tensor,
    ) -> None:
        """hosts [L, E, G]; `like` [.., H]: a tensor of the model's width, type and device."""
        self.local = local
        self.exchange = exchange
        self.top_k = top_k
        self._like = like
        self.ownership = Ownership(hosts, exchange.rank, like.device)

    def place(self, hosts: Hosts) -> None:
        """From now on experts live as hosts [L, E, G] says; those that no longer run here leave this rank's cache."""
        self.ownership = Ownership(hosts, self.exchange.rank, self._like.device)
        self.local.keep_only(hosts[:, :, self.exchange.rank])

    def no_tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden, ids and weights of no token at all."""
        none = torch.empty(0, self.top_k, device=self._like.device)
        return self._like.new_empty(0, self._like.shape[-1]), none.long(), none

    def run_share(
        self,
        layer: MoELayer,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        losses: LossNotes,
        num_own: int | None = None,
    ) -> torch.Tensor:
        """hidden [T, H]; ids [T, K] int64 with NOT_HERE; weights [T, K] float32 -> [T, H] float32 at least.

        For each token the weighted sum over its choices that are here. Tokens from row `num_own` on are other
        ranks': an unreadable expert makes theirs NaN, and puts the others into `losses`.
        """
        partial = self.local.partial_sums(layer, hidden, ids, weights)
        for row, error in self.local.take_failures().items():
            if num_own is not None and row >= num_own:
                partial[row] = float("nan")
            else:
                losses.add(row, error)
        return partial

    def count(self, layer: MoELayer, ranks: torch.Tensor, home: int | torch.Tensor) -> None:
        """Book the choices `ranks` [T, K] of tokens whose home is rank `home` (or homes [T, 1])."""
        traffic = self.exchange.traffic
        remote = int((ranks != home).sum())
        traffic.remote_rows += remote
        traffic.local_rows += ranks.numel() - remote
        row_bytes = self._like.shape[-1] * (self._like.element_size() + max(4, self._like.element_size()))
        traffic.unmerged_bytes[layer] += remote * row_bytes


class SharedExperts:
    """Experts over ranks, but for `run`: memory, reports and books are those of this rank's share."""

    padding = None
    """Other ranks have to be asked in every layer."""

    def __init__(self, shared: ExpertShare) -> None:
        self.shared = shared
        self.routes = shared.local.routes
        self.losses = LossNotes()

    def in_place(self) -> None:
        """Some experts are elsewhere."""

    def begin_step(self, plan: BatchPlan) -> None:
        """See Experts."""
        self.shared.local.begin_step(plan)

    def between_steps(self) -> None:
        """See Experts."""
        self.shared.local.between_steps()

    def take_failures(self) -> dict[int, ExpertReadError]:
        """See Experts; an expert on another rank that could not be read counts."""
        return self.losses.take()

    def resize(self, mib: int) -> None:
        """See Experts."""
        self.shared.local.resize(mib)

    def resident(self) -> NDArray[np.bool_] | None:
        """See Experts."""
        return self.shared.local.resident()

    def report(self) -> ExpertReport:
        """See Experts."""
        return self.shared.local.report()

    def totals(self) -> ExpertTotals:
        """See Experts."""
        return self.shared.local.totals()

    def close(self) -> None:
        """See Experts."""
        self.shared.local.close()
