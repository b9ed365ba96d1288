"""Conventional expert parallelism: in every MoE layer tokens go to their experts' ranks and partial sums come back.

A token goes once to each rank, however many of its choices are there, and one partial sum comes back from each.
Knows the layer call that Hugging Face's blocks make; knows no sequences.

Shape alphabet: T tokens, V visiting tokens of other ranks, K choices, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expert_cache.storage.errors import ExpertReadError
from expert_cache.layers import Experts
from moe_serve.parallel.modes.expert_share import ExpertShare, LossNotes, share_of
from moe_serve.parallel.wire.exchange import pack, unpack


class ConventionalLayers:
    """Stands where ExpertLayers stood; every rank must call `run` or `join` for each MoE layer of a step."""

    def __init__(self, shared: ExpertShare) -> None:
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
        ours = hidden, share_of(ids, ranks, exchange.rank), weights
        rows_for = {r: (ranks == r).any(1).nonzero()[:, 0] for r in exchange.others}
        leaving = {
            r: pack(hidden[n], share_of(ids, ranks, r)[n].short(), weights[n]).flatten() for r, n in rows_for.items()
        }
        index = shared.index(layer)
        exchange.book(index, "dispatch", sum(map(len, leaving.values())))
        visitors = exchange.trade(index, leaving, exchange.others)
        partial, answers = self._answer(layer, ours, visitors)
        exchange.book(index, "combine", sum(map(len, answers.values())))
        back = exchange.trade(index, answers, [r for r, rows in rows_for.items() if len(rows)])
        return self._sum(partial, rows_for, back).to(hidden.dtype)

    def _answer(
        self, layer: int, own: tuple[torch.Tensor, torch.Tensor, torch.Tensor], visitors: Mapping[int, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Own and visiting tokens through this rank's experts: partial sums of the own, and messages for the others."""
        top_k = own[1].shape[1]
        columns = (own[0].shape[1], own[0].dtype), (top_k, torch.int16), (top_k, torch.float32)
        unpacked = {r: unpack(raw, *columns) for r, raw in visitors.items() if len(raw)}
        theirs = [(hidden, ids.long(), weights) for hidden, ids, weights in unpacked.values()]
        everyone = [torch.cat(column) for column in zip(own, *theirs, strict=True)]
        num_own = len(own[0])
        partial = self.shared.run_share(layer, everyone[0], everyone[1], everyone[2], self._losses, num_own)
        answers = torch.split(partial[num_own:], [len(hidden) for hidden, _, _ in theirs])
        return partial[:num_own], {r: pack(part).flatten() for r, part in zip(unpacked, answers, strict=True)}

    def _sum(
        self, total: torch.Tensor, rows_for: Mapping[int, torch.Tensor], back: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Own partial sums [T, H] and those that came back."""
        for rank, raw in sorted(back.items()):
            (theirs,) = unpack(raw, (total.shape[1], total.dtype))
            self._losses.note(rows_for[rank], theirs, rank)
            total = total.index_add(0, rows_for[rank], theirs)
        return total

    def take_failures(self) -> dict[int, ExpertReadError]:
        """As ExpertLayers.take_failures; an expert on another rank that could not be read counts."""
        return self._losses.take()
