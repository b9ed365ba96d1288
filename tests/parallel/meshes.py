"""Ranks without processes: threads, and experts that multiply by their number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.running.usage import RouteBuffer
from expert_cache.storage.errors import ExpertReadError
from moe_serve.parallel.modes.exchange import Exchange
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.wire.sockets import Wire

HIDDEN = 4


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results, or the exceptions raised, of calls that wait for one another."""
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


class FakeExperts:
    """Expert e makes (e + 1) h of h; one may be unreadable."""

    reads_can_fail = False

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.routes = RouteBuffer(num_layers, num_experts)
        self.unreadable: int | None = None
        self._failed: dict[int, ExpertReadError] = {}

    def partial_sums(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        is_here = ids >= 0
        for row in (ids == self.unreadable).any(1).nonzero()[:, 0].tolist() if self.unreadable is not None else ():
            self._failed[row] = ExpertReadError("gone")
        return hidden.float() * (is_here * weights * (ids + 1)).sum(1, keepdim=True)

    def take_failures(self) -> dict[int, ExpertReadError]:
        failed, self._failed = self._failed, {}
        return failed


def shared_layers(
    wires: Sequence[Wire], hosts: NDArray[np.bool_], top_k: int, dtype: torch.dtype = torch.float32
) -> list[ExpertShare]:
    """Every rank's; hosts [L, E, G]."""
    num_layers, num_experts, num_ranks = hosts.shape
    found = []
    for rank, wire in enumerate(wires):
        local: Any = FakeExperts(num_layers, num_experts)
        exchange = Exchange(rank, num_ranks, num_layers, wire)
        found.append(ExpertShare(local, hosts, exchange, top_k, torch.empty(0, HIDDEN, dtype=dtype)))
    return found


def expected(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What one rank would make of it."""
    return (hidden.float() * (weights * (ids + 1)).sum(1, keepdim=True)).to(hidden.dtype)
