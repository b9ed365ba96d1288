"""Ownership: to which rank each of a token's choices goes, where several may hold the expert.

Knows the placement and this rank's own recent sends; knows no communication.

Shape alphabet: T tokens, K choices, L MoE layers by dense index, E experts, G ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moe_serve.parallel.modes.copies import Bools, Ints, choose_copies
from placement.cost import Hosts

FORGET = 0.9
"""What remains of a rank's counted load after each layer call: the last ten calls decide."""


class Ownership:
    """The placement, and the choice among copies (`choose_copies`)."""

    def __init__(self, hosts: Hosts, layers: Sequence[int], rank: int, device: torch.device) -> None:
        self.hosts = hosts
        self.rank = rank
        self.num_ranks = hosts.shape[2]
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._only: Ints = hosts.argmax(2)
        self._only_on_device = torch.from_numpy(self._only).to(device)
        self._is_single = [bool(layer.sum(1).max() == 1) for layer in hosts]
        self._load = np.zeros(self.num_ranks)

    def choose(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """ids [T, K] int64 of a decoder layer's experts -> ranks [T, K] int64 that run them."""
        index = self._index[layer]
        if self._is_single[index]:
            return self._only_on_device[index][ids]
        ranks = self._choose(index, ids.cpu().numpy(), np.full(len(ids), self.rank))
        return torch.from_numpy(ranks).to(ids.device)

    def agree(self, layer: int, ids: Ints, homes: Ints | None) -> Ints:
        """As `choose`, the same on every rank that asks for the same tokens. `homes` [T]: ranks to prefer, if any."""
        index = self._index[layer]
        return self._only[index][ids] if self._is_single[index] else self._choose(index, ids, homes)

    def everywhere(self, layer: int, ids: Ints) -> Bools:
        """[T] whether every rank holds all of a token's experts."""
        index = self._index[layer]
        if self._is_single[index] and self.num_ranks > 1:
            return np.zeros(len(ids), np.bool_)
        found: Bools = self.hosts[index].all(1)[ids].all(1)
        return found

    def _choose(self, index: int, ids: Ints, here: Ints | None) -> Ints:
        ranks = choose_copies(self.hosts[index][ids], self._load, here)
        self._load = FORGET * self._load + np.bincount(ranks.ravel(), minlength=self.num_ranks)
        return ranks

    def holds(self, layer: int, expert: int) -> bool:
        return bool(self.hosts[self._index[layer], expert, self.rank])
