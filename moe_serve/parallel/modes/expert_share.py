"""ExpertShare: what both modes need of a MoE layer of which this rank runs a share.

Sums are float32 and in the router's order, so that with two choices per token, wherever they run, the
bits are those of one rank; with more they differ by the rounding of a float32 sum.

Shape alphabet: T tokens, K choices, H hidden.
"""

from __future__ import annotations

import torch

from expert_cache.errors import ExpertReadError
from expert_cache.layers import ExpertLayers
from expert_cache.regroup import regroup_pairs
from moe_serve.parallel.modes.ownership import Ownership
from moe_serve.parallel.wire.exchange import Exchange

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
        self, local: ExpertLayers, ownership: Ownership, exchange: Exchange, top_k: int, like: torch.Tensor
    ) -> None:
        """`like` [.., H]: a tensor of the model's width, type and device."""
        self.local = local
        self.ownership = ownership
        self.exchange = exchange
        self.top_k = top_k
        self._like = like
        self._index = {layer: i for i, layer in enumerate(local.experts.store.layers)}

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers with experts, in order."""
        return self.local.experts.store.layers

    def index(self, layer: int) -> int:
        """Of a decoder layer among those with experts."""
        return self._index[layer]

    def no_tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden, ids and weights of no token at all."""
        none = torch.empty(0, self.top_k, device=self._like.device)
        return self._like.new_empty(0, self._like.shape[-1]), none.long(), none

    def run_share(
        self,
        layer: int,
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
        pairs = (ids.flatten() != NOT_HERE).nonzero()[:, 0]
        outputs = self.local.compute.result_like(hidden, ids.numel()).zero_()
        if len(pairs):
            token_of = pairs.div(ids.shape[1], rounding_mode="floor")
            groups = regroup_pairs(ids.flatten()[pairs], token_of, self.local.experts.store.num_experts)
            outputs.index_copy_(0, pairs, self.local.run_pairs(layer, hidden, groups))
        partial = (outputs.view(*ids.shape, hidden.shape[1]) * weights[..., None]).sum(dim=1)
        for row, error in self.local.take_failures().items():
            if num_own is not None and row >= num_own:
                partial[row] = float("nan")
            else:
                losses.add(row, error)
        return partial

    def count(self, layer: int, ranks: torch.Tensor, home: int | torch.Tensor) -> None:
        """Book the choices `ranks` [T, K] of tokens whose home is rank `home` (or homes [T, 1])."""
        traffic = self.exchange.traffic
        remote = int((ranks != home).sum())
        traffic.remote_rows += remote
        traffic.local_rows += ranks.numel() - remote
        row_bytes = self._like.shape[-1] * (self._like.element_size() + max(4, self._like.element_size()))
        traffic.unmerged_bytes[self.index(layer)] += remote * row_bytes
