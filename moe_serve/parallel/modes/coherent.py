"""Context-coherent expert parallelism (ExFlow, arXiv 2401.08383): a decoding token stays where its expert ran.

In every MoE layer a token goes from where it is to the ranks of its choices, and one of these becomes its new
place: what travels is the hidden state before the block's norm, so that the new place can finish the layer alone.
A token with one other rank to visit moves there and takes along what its old rank's experts gave: one message, one
link delay. Only where choices lie on several other ranks do partial sums follow in a second one. Prompts stay at home.

Here is one layer's exchange; the walk through the layers is in `coherent_layers.py`.

Shape alphabet: T tokens here, K choices, H hidden, W bytes in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve.parallel.modes.context import ContextShare
from moe_serve.parallel.modes.expert_share import ExpertShare, LossNotes, share_of
from moe_serve.parallel.wire.exchange import pack, unpack


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
    sources: torch.Tensor
    """[T] int64: the rank where it was before."""

    def pick(self, chosen: torch.Tensor) -> Travellers:
        """`chosen` [n]: indices."""
        return Travellers(*(getattr(self, name)[chosen] for name in self.__slots__))

    def plus(self, *others: Travellers) -> Travellers:
        return Travellers(*(torch.cat([getattr(t, name) for t in (self, *others)]) for name in self.__slots__))

    def visit(self, rank: int) -> torch.Tensor:
        """[T] whether a rank runs some of a token's experts."""
        return (self.ranks == rank).any(1)

    def packed(self) -> torch.Tensor:
        """uint8 [T * W], but for the sources, which whoever receives it knows."""
        places = self.rows.int(), self.homes.to(torch.uint8)
        return pack(self.hidden, self.ids.short(), self.ranks.to(torch.uint8), self.weights, *places).flatten()

    def read(self, raw: torch.Tensor, source: int) -> Travellers:
        """What `packed` made of tokens like these on rank `source`."""
        top_k = self.ids.shape[1]
        routes = (top_k, torch.int16), (top_k, torch.uint8), (top_k, torch.float32)
        hidden, ids, ranks, weights, rows, homes = unpack(
            raw, (self.hidden.shape[1], self.hidden.dtype), *routes, (1, torch.int32), (1, torch.uint8)
        )
        places = rows[:, 0].long(), homes[:, 0].long(), torch.full((len(rows),), source, device=rows.device)
        return Travellers(hidden, ids.long(), ranks.long(), weights, *places)


def settle(ranks: torch.Tensor, me: int, num_ranks: int) -> torch.Tensor:
    """[T] where tokens now on rank `me` are after a layer whose choices run on `ranks` [T, K].

    Here if all run here; on the only other rank if there is one; else where the first choice runs.
    """
    other = (ranks[:, :, None] == torch.arange(num_ranks, device=ranks.device)).any(1)
    other[:, me] = False
    count = other.sum(1)
    return torch.where(count == 0, me, torch.where(count == 1, other.int().argmax(1), ranks[:, 0]))


class Meeting:
    """One rank's side of the exchanges of a MoE layer."""

    def __init__(self, shared: ExpertShare, losses: LossNotes, context: ContextShare) -> None:
        self._shared = shared
        self._losses = losses
        self._context = context

    def run(self, layer: int, here: Travellers, norm: torch.nn.Module) -> tuple[Travellers, torch.Tensor]:
        """The tokens whose home is now here, by ascending row, and what their experts gave: float32 [T, H]."""
        exchange, index = self._shared.exchange, self._shared.index(layer)
        partial = self._partial(layer, here, norm)
        leaving = self._messages(layer, here, partial)
        arrived = [
            self._read(layer, r, raw, here) for r, raw in exchange.trade(index, leaving, exchange.others).items()
        ]
        visitors = here.pick(here.rows[:0]).plus(*(tokens for tokens, _ in arrived))
        theirs = self._partial(layer, visitors, norm)
        theirs = theirs + torch.cat([partial[:0], *(given for _, given in arrived)])
        return self._gather(index, here.plus(visitors), torch.cat([partial, theirs]))

    def _messages(self, layer: int, here: Travellers, partial: torch.Tensor) -> dict[int, torch.Tensor]:
        """For every other rank: tokens, those with a part of their sum, those parts, and the context that is due."""
        exchange, index = self._shared.exchange, self._shared.index(layer)
        layers = self._context.due(layer)
        context = self._context.packed(layers).to(here.hidden.device)
        counts = self._context.counts(layers)
        messages = {}
        for r in exchange.others:
            takes_part = (here.homes == r) & here.visit(exchange.rank)
            plain = here.pick((here.visit(r) & ~takes_part).nonzero()[:, 0])
            parted = takes_part.nonzero()[:, 0]
            sums = pack(partial[parted]).flatten()
            tokens = torch.cat([plain.packed(), here.pick(parted).packed()])
            header = numbers([len(plain.rows), len(parted), *counts], tokens.device)
            for kind, raw in (("control", header), ("dispatch", tokens), ("combine", sums), ("context", context)):
                exchange.book(index, kind, len(raw))
            messages[r] = torch.cat([header, tokens, sums, context])
        return messages

    def _read(self, layer: int, rank: int, raw: torch.Tensor, like: Travellers) -> tuple[Travellers, torch.Tensor]:
        """Another rank's tokens and their parts [n, H], zero for those without; its context is put away."""
        layers = self._context.due(layer)
        header_bytes = 4 * (2 + len(layers))
        num_plain, num_parted, *counts = read_numbers(raw[:header_bytes])
        result = self._shared.local.compute.result_like(like.hidden, num_plain + num_parted).zero_()
        part_bytes = num_parted * result.shape[1] * result.element_size()
        token_bytes = (num_plain + num_parted) * self._token_bytes(like)
        tokens, sums, context = torch.split(
            raw[header_bytes:], [token_bytes, part_bytes, len(raw) - header_bytes - token_bytes - part_bytes]
        )
        self._context.take(layers, counts, context)
        arrived = like.read(tokens, rank)
        (result[num_plain:],) = unpack(sums, (result.shape[1], result.dtype))
        self._losses.note(arrived.rows, result, rank)
        return arrived, result

    def _token_bytes(self, like: Travellers) -> int:
        """Of a row of `Travellers.packed`."""
        return like.hidden.shape[1] * like.hidden.element_size() + like.ids.shape[1] * (2 + 1 + 4) + 4 + 1

    def _partial(self, layer: int, tokens: Travellers, norm: torch.nn.Module) -> torch.Tensor:
        """What this rank's experts give them: float32 [T, H]."""
        ids = share_of(tokens.ids, tokens.ranks, self._shared.exchange.rank)
        notes = LossNotes()
        partial = self._shared.run_share(layer, norm(tokens.hidden), ids, tokens.weights, notes)
        for row, error in notes.take().items():
            partial[row] = float("nan")
            self._losses.add(int(tokens.rows[row]), error)
        return partial

    def _gather(self, index: int, tokens: Travellers, partial: torch.Tensor) -> tuple[Travellers, torch.Tensor]:
        """Of all tokens that are or came here, those that stay, with the parts of ranks where they never were."""
        exchange = self._shared.exchange
        order = tokens.rows.argsort()
        tokens, partial = tokens.pick(order), partial[order]
        me = exchange.rank
        ran_here = tokens.visit(me) & (tokens.sources != me)
        leaving = {r: (ran_here & (tokens.homes == r)).nonzero()[:, 0] for r in exchange.others}
        at_home = (tokens.homes == me).nonzero()[:, 0]
        home, total = tokens.pick(at_home), partial[at_home]
        coming = {r: (home.visit(r) & (home.sources != r)).nonzero()[:, 0] for r in exchange.others}
        outgoing = {r: pack(partial[rows]).flatten() for r, rows in leaving.items() if len(rows)}
        exchange.book(index, "combine", sum(map(len, outgoing.values())))
        expected = [r for r, rows in coming.items() if len(rows)]
        for rank, raw in sorted(exchange.trade(index, outgoing, expected).items()):
            (theirs,) = unpack(raw, (total.shape[1], total.dtype))
            self._losses.note(home.rows[coming[rank]], theirs, rank)
            total = total.index_add(0, coming[rank], theirs)
        return home, total


def numbers(values: list[int], device: torch.device) -> torch.Tensor:
    """As uint8."""
    return torch.tensor(values, dtype=torch.int32, device=device).view(torch.uint8)


def read_numbers(raw: torch.Tensor) -> list[int]:
    """What `numbers` packed."""
    values: list[int] = raw.clone().view(torch.int32).tolist()
    return values
