"""Ownership: to which rank each of a token's choices goes, where several may hold the expert.

Knows the placement and this rank's own recent sends; knows no communication.

Shape alphabet: T tokens, K choices, L MoE layers, E experts, G ranks.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_serve.parallel.modes.copies import Bools, Ints, choose_copies
from placement.cost import Hosts
from predictors.shape import MoELayer

FORGET = 0.9
"""What remains of a rank's counted load after each layer call: the last ten calls decide."""


class Ownership:
    """The placement, and the choice among copies (`choose_copies`)."""

    def __init__(self, hosts: Hosts, rank: int, device: torch.device) -> None:
        self.hosts = hosts
        self.rank = rank
        self.num_ranks = hosts.shape[2]
        self._only: Ints = hosts.argmax(2)
        self._only_on_device = torch.from_numpy(self._only).to(device)
        self._is_single = [bool(layer.sum(1).max() == 1) for layer in hosts]
        self._load = np.zeros(self.num_ranks)

    def choose(self, layer: MoELayer, ids: torch.Tensor) -> torch.Tensor:
        """ids [T, K] int64 of a layer's experts -> ranks [T, K] int64 that run them."""
        if self._is_single[layer]:
            return self._only_on_device[layer][ids]
        ranks = self._choose(layer, ids.cpu().numpy(), np.full(len(ids), self.rank))
        return torch.from_numpy(ranks).to(ids.device)

    def agree(self, layer: MoELayer, ids: Ints, homes: Ints | None) -> Ints:
        """As `choose`, the same on every rank that asks for the same tokens. `homes` [T]: ranks to prefer, if any."""
        return self._only[layer][ids] if self._is_single[layer] else self._choose(layer, ids, homes)

    def everywhere(self, layer: MoELayer, ids: Ints) -> Bools:
        """[T] whether every rank holds all of a token's experts."""
        if self._is_single[layer] and self.num_ranks > 1:
            return np.zeros(len(ids), np.bool_)
        found: Bools = self.hosts[layer].all(1)[ids].all(1)
        return found

    def _choose(self, layer: MoELayer, ids: Ints, here: Ints | None) -> Ints:
        ranks = choose_copies(self.hosts[layer][ids], self._load, here)
        self._load = FORGET * self._load + np.bincount(ranks.ravel(), minlength=self.num_ranks)
        return ranks

    def holds(self, layer: MoELayer, expert: int) -> bool:
        return bool(self.hosts[layer, expert, self.rank])
