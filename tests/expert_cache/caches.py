"""Expert caches for tests: any capacity, any policy, and files that can be made to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from expert_cache.host_managed.cache import ExpertCache
from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.host_managed.in_flight import START_EARLY_BYTES
from expert_cache.policies import find_policy
from expert_cache.running.compute import ExpertCompute
from expert_cache.running.mapped import MappedExperts
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage.arena import HostArena
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertStore
from moe_serve_kernels.cpu.expert_mlp import Activation

NEVER = 1 << 60


def compute_of(activation: Activation, dtype: torch.dtype = torch.float32, matrix_tokens: int = NEVER) -> ExpertCompute:
    return ExpertCompute(activation, dtype, torch.device("cpu"), matrix_tokens)


def mapped_layers(
    store: ExpertStore, activation: Activation, dtype: torch.dtype = torch.float32, matrix_tokens: int = NEVER
) -> MappedExperts:
    compute = compute_of(activation, dtype, matrix_tokens)
    return MappedExperts(store, compute)


@contextmanager
def cached_layers(
    store: ExpertStore,
    activation: Activation,
    slots: Capacity,
    dtype: torch.dtype = torch.float32,
    policy: str = "lru",
    fetcher: Fetcher | None = None,
    matrix_tokens: int = NEVER,
    start_early_bytes: int = START_EARLY_BYTES,
    num_transit: int = 0,
) -> Iterator[HostManagedExperts[object]]:
    compute = compute_of(activation, dtype, matrix_tokens)
    arena = HostArena(store.num_total + num_transit, store.slot_bytes)
    keeper = find_policy(policy)(len(store.layers), store.num_experts)
    cache = ExpertCache(
        store, compute.prepare, arena, slots, num_transit, keeper, fetcher or Fetcher(), start_early_bytes
    )
    yield HostManagedExperts(cache, compute)
    cache.check_integrity()
    cache.close()


class SteppedFetcher(Fetcher):
    """Reads a chunk when told to, or while someone waits: the same order in every run."""

    def __init__(self, open_file: Callable[[Path], DirectFile] = DirectFile) -> None:
        super().__init__(0, open_file)

    def step(self) -> bool:
        """Read one chunk; False if none is wanted."""
        if not any(fetch.wants_reading for fetch in self._queue):
            return False
        task = self._next_chunk()
        assert task is not None
        self._chunk_done(*task, self._try_to_read(*task))
        return True

    def wait_until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            assert self.step(), "waiting for something nobody reads"
