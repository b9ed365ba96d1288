"""Calibration: how long a missing expert takes to come, and to be computed where it is, on this machine.

Done once, before the cache is used, with the model's own experts, the cache's own reading path and the kernel that will
run. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expert_cache.host_compute.crossover import MissCosts, calibrate
from expert_cache.host_compute.host_experts import HostExperts
from expert_cache.storage import DEMAND, ExpertReadError, ExpertStore, Fetch, Fetcher, SlotArena


def measure(
    store: ExpertStore,
    arena: SlotArena,
    fetcher: Fetcher,
    lane: HostExperts,
    dtype: torch.dtype,
    synchronize: Callable[[], None],
) -> MissCosts:
    """Measures both ways. `arena` must be unused so far.

    `dtype`: of the activations. `synchronize` waits for the device.

    ExpertReadError: an expert cannot be read.
    """
    keys = [(layer, expert) for expert in range(store.num_experts) for layer in store.layers]
    hidden_size = store.weights(*keys[0]).gate.shape[1]

    def bring(number: int) -> None:
        key = keys[number % len(keys)]
        fetch = Fetch.of(store, key, arena.landing(0), DEMAND)
        fetcher.submit(fetch)
        fetcher.wait_until(lambda: fetch.is_done)
        if fetch.error is not None:
            arena.dropped(0)
            raise fetch.error
        arena.landed(0)
        arena.tensor(0)
        synchronize()

    def run_on_host(number: int, tokens: int) -> None:
        layer, expert = keys[number % len(keys)]
        _, failed = lane.run(layer, torch.randn(tokens, hidden_size).to(dtype), [expert], [tokens])
        for error in failed.values():
            raise ExpertReadError(error.message)

    costs = calibrate(bring, run_on_host)
    arena.release(0)
    return costs
