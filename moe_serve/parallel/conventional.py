"""Conventional expert parallelism: in every MoE layer tokens go to their experts' ranks and partial sums come back.

A token goes once to each rank, however many of its choices are there, and one partial sum comes back from each.
Knows the layer call that Hugging Face's blocks make; knows no sequences.

Shape alphabet: T tokens, V visiting tokens of other ranks, K choices, H hidden.
"""

from __future__ import annotations

import torch

from expert_cache.errors import ExpertReadError
from expert_cache.layers import Experts
from moe_serve.parallel.exchange import pack, unpack
from moe_serve.parallel.sharing import LossNotes, SharedLayers, share_of


class ConventionalLayers:
    """Stands where ExpertLayers stood; every rank must call `run` or `join` for each MoE layer of a step."""

    def __init__(self, shared: SharedLayers) -> None:
        self.shared = shared
        self.experts: Experts = shared.local.experts
        self._losses = LossNotes()

    def join(self, layer: int) -> None:
        """Take part in a layer without a token of our own."""
        self.run(layer, *self.shared.no_tokens())

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As ExpertLayers.run: hidden [T, H]; ids, weights [T, K] -> [T, H]."""
        shared, exchange = self.shared, self.shared.exchange
        weights = weights.to(torch.float32)
        ranks = shared.ownership.choose(layer, ids)
        shared.count(layer, ranks, exchange.rank)
        rows_for = [(ranks == r).any(1).nonzero()[:, 0] for r in range(exchange.num_ranks)]
        rows_for[exchange.rank] = rows_for[exchange.rank][:0]
        index = shared.index(layer)
        counts = exchange.counts(index, [len(rows) for rows in rows_for])
        is_quiet = not any(map(sum, counts))
        ours = share_of(ids, ranks, exchange.rank)
        if is_quiet:
            total = shared.run_share(layer, hidden, ours, weights, self._losses)
        else:
            parts = [pack(hidden[n], share_of(ids, ranks, r)[n].short(), weights[n]) for r, n in enumerate(rows_for)]
            incoming = [row[exchange.rank] for row in counts]
            visitors = exchange.swap(index, "dispatch", parts, incoming)
            total = self._with_visitors(layer, (hidden, ours, weights), visitors, rows_for)
        return total.to(hidden.dtype)

    def _with_visitors(
        self,
        layer: int,
        own: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        visitors: list[torch.Tensor],
        rows_for: list[torch.Tensor],
    ) -> torch.Tensor:
        """Own and visiting tokens through this rank's experts, then the partial sums where they belong: [T, H]."""
        shared, num_own = self.shared, len(own[0])
        top_k = own[1].shape[1]
        hidden, ids, weights = unpack(
            torch.cat(visitors), (own[0].shape[1], own[0].dtype), (top_k, torch.int16), (top_k, torch.float32)
        )
        everyone = [torch.cat(pair) for pair in zip(own, (hidden, ids.long(), weights), strict=True)]
        partial = shared.run_share(layer, everyone[0], everyone[1], everyone[2], self._losses, num_own)
        answers = torch.split(partial[num_own:], [len(part) for part in visitors])
        back = shared.exchange.swap(
            shared.index(layer), "combine", [pack(part) for part in answers], [len(rows) for rows in rows_for]
        )
        total = partial[:num_own]
        for rank, (rows, raw) in enumerate(zip(rows_for, back, strict=True)):
            (theirs,) = unpack(raw, (total.shape[1], total.dtype))
            self._losses.note(rows, theirs, rank)
            total = total.index_add(0, rows, theirs)
        return total

    def take_failures(self) -> dict[int, ExpertReadError]:
        """As ExpertLayers.take_failures; an expert on another rank that could not be read counts."""
        return self._losses.take()
