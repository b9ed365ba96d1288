"""Ownership: to which rank each of a token's choices goes, where several may hold the expert.

Knows the placement and this rank's own recent sends; knows no communication.

Shape alphabet: T tokens, K choices, L MoE layers by dense index, E experts, G ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moe_serve.parallel.plans import Hosts

FORGET = 0.9
"""What remains of a rank's counted load after each layer call: the last ten calls decide."""


class Ownership:
    """The placement, and the choice among copies: here if there is one, else where the token goes anyway, else idle."""

    def __init__(self, hosts: Hosts, layers: Sequence[int], rank: int, device: torch.device) -> None:
        self.hosts = hosts
        self.rank = rank
        self.num_ranks = hosts.shape[2]
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._hosts = torch.from_numpy(hosts).to(device)
        self._only = torch.from_numpy(hosts.argmax(2)).to(device)
        self._is_single = [bool(layer.sum(1).max() == 1) for layer in hosts]
        self._load = torch.zeros(self.num_ranks, device=device)

    def choose(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """ids [T, K] int64 of a decoder layer's experts -> ranks [T, K] int64 that run them."""
        here = torch.full((len(ids),), self.rank, device=ids.device)
        return self._choose(self._index[layer], ids, here)

    def agree(self, layer: int, ids: torch.Tensor, homes: torch.Tensor | None) -> torch.Tensor:
        """As `choose`, the same on every rank that asks for the same tokens. `homes` [T]: ranks to prefer, if any."""
        return self._choose(self._index[layer], ids, homes)

    def everywhere(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """[T] whether every rank holds all of a token's experts."""
        return self._hosts[self._index[layer]][ids].all(2).all(1)

    def _choose(self, index: int, ids: torch.Tensor, here: torch.Tensor | None) -> torch.Tensor:
        """Among several copies: the one here, else one where the token goes anyway, else where most of it can go."""
        if self._is_single[index]:
            return self._only[index][ids]
        held = self._hosts[index][ids]  # [T, K, G]
        top_k = ids.shape[1]
        rest = held
        score = 1.0 / (1.0 + self._load).expand(len(ids), 1, -1)
        if here is not None:
            is_here = nn.functional.one_hot(here, self.num_ranks)[:, None].bool()
            rest = held & ~(held & is_here).any(2, keepdim=True)
            score = score + 4.0 * (top_k + 1) * is_here
        must = (held & (held.sum(2, keepdim=True) == 1)).any(1, keepdim=True)
        score = score + 2.0 * (top_k + 1) * must + rest.sum(1, keepdim=True)
        ranks = torch.where(held, score, -1.0).argmax(2)
        self._load = FORGET * self._load + torch.bincount(ranks.flatten(), minlength=self.num_ranks)
        return ranks

    def holds(self, layer: int, expert: int) -> bool:
        return bool(self._hosts[self._index[layer], expert, self.rank])
