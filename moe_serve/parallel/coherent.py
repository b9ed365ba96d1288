"""Context-coherent expert parallelism (ExFlow, arXiv 2401.08383): a decoding token stays where its expert ran.

In every MoE layer a token goes from where it is to the ranks of its choices, and the rank of its first choice
becomes its new place: what travels is the hidden state before the block's norm, so that the new place can
finish the layer alone. Partial sums of its other choices' ranks follow in a second all-to-all, which with
one choice per token, or a plan that keeps choices together, is empty and left out. Prompts stay at home.

Here is one layer's exchange; the walk through the layers is in `coherent_layers.py`.

Shape alphabet: T tokens here, K choices, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve.parallel.exchange import pack, unpack
from moe_serve.parallel.sharing import LossNotes, SharedLayers, share_of


@dataclass(frozen=True, slots=True)
class Travellers:
    """Tokens on the way through a MoE layer, row by row."""

    hidden: torch.Tensor
    """[T, H] before the norm of the MoE block."""
    ids: torch.Tensor
    """[T, K] int64."""
    ranks: torch.Tensor
    """[T, K] int64: where each choice runs."""
    weights: torch.Tensor
    """[T, K] float32."""
    rows: torch.Tensor
    """[T] int64: the token's row in the step's batch."""
    homes: torch.Tensor
    """[T] int64: the rank where the token is after the layer."""

    def pick(self, chosen: torch.Tensor) -> Travellers:
        """`chosen` [n]: indices."""
        return Travellers(*(getattr(self, name)[chosen] for name in self.__slots__))

    def packed(self) -> torch.Tensor:
        """[T, W] uint8."""
        small = (
            self.ids.short(),
            self.ranks.to(torch.uint8),
            self.weights,
            self.rows.int(),
            self.homes.to(torch.uint8),
        )
        return pack(self.hidden, *small)

    def with_arrivals(self, raw: torch.Tensor) -> Travellers:
        """These and those packed in `raw` [n, W]."""
        top_k = self.ids.shape[1]
        hidden, ids, ranks, weights, rows, homes = unpack(
            raw,
            (self.hidden.shape[1], self.hidden.dtype),
            (top_k, torch.int16),
            (top_k, torch.uint8),
            (top_k, torch.float32),
            (1, torch.int32),
            (1, torch.uint8),
        )
        arrived = (hidden, ids.long(), ranks.long(), weights, rows[:, 0].long(), homes[:, 0].long())
        own = (getattr(self, name) for name in self.__slots__)
        return Travellers(*(torch.cat(pair) for pair in zip(own, arrived, strict=True)))


class Meeting:
    """One rank's side of the exchanges of a MoE layer."""

    def __init__(self, shared: SharedLayers, losses: LossNotes) -> None:
        self._shared = shared
        self._losses = losses

    def run(self, layer: int, here: Travellers, norm: torch.nn.Module) -> tuple[Travellers, torch.Tensor]:
        """The tokens whose home is now here, by ascending row, and what their experts gave: float32 [T, H]."""
        exchange, index = self._shared.exchange, self._shared.index(layer)
        me = exchange.rank
        wanted = [(here.homes == r) | (here.ranks == r).any(1) for r in range(exchange.num_ranks)]
        going = [rows.nonzero()[:, 0] for rows in wanted]
        going[me] = going[me][:0]
        scattered = (here.ranks != here.homes[:, None]).any()
        numbers = exchange.counts(index, [len(rows) for rows in going] + [int(scattered)])
        everyone = here
        if any(sum(row[:-1]) for row in numbers):
            parts = [here.pick(rows).packed() for rows in going]
            raw = exchange.swap(index, "dispatch", parts, [row[me] for row in numbers])
            everyone = here.with_arrivals(torch.cat(raw))
        partial = self._partial(layer, everyone, norm)
        at_home = (everyone.homes == me).nonzero()[:, 0]
        at_home = at_home[everyone.rows[at_home].argsort()]
        home, total = everyone.pick(at_home), partial[at_home]
        if any(row[-1] for row in numbers):
            total = self._gather(index, everyone, partial, home, total)
        return home, total

    def _partial(self, layer: int, everyone: Travellers, norm: torch.nn.Module) -> torch.Tensor:
        me = self._shared.exchange.rank
        ids = share_of(everyone.ids, everyone.ranks, me)
        notes = LossNotes()
        partial = self._shared.run_share(layer, norm(everyone.hidden), ids, everyone.weights, notes)
        for row, error in notes.take().items():
            partial[row] = float("nan")
            self._losses.add(int(everyone.rows[row]), error)
        return partial

    def _gather(
        self, index: int, everyone: Travellers, partial: torch.Tensor, home: Travellers, total: torch.Tensor
    ) -> torch.Tensor:
        """Partial sums to their tokens' homes; `total` with those of other ranks added."""
        exchange = self._shared.exchange
        me, ranks = exchange.rank, range(exchange.num_ranks)
        ran_here = (everyone.ranks == me).any(1)
        leaving = [(ran_here & (everyone.homes == r)).nonzero()[:, 0] for r in ranks]
        leaving[me] = leaving[me][:0]
        parts = [pack(partial[n], everyone.rows[n].int()) for n in leaving]
        expected = [int((home.ranks == r).any(1).sum()) if r != me else 0 for r in ranks]
        for rank, raw in enumerate(exchange.swap(index, "combine", parts, expected)):
            theirs, rows = unpack(raw, (total.shape[1], total.dtype), (1, torch.int32))
            self._losses.note(rows[:, 0].long(), theirs, rank)
            total = total.index_add(0, torch.searchsorted(home.rows, rows[:, 0].long()), theirs)
        return total
