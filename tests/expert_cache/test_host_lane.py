"""Computing experts on the host beside a device: the CPU plays the device, with a thread of its own for the host."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from expert_cache.host_compute.calibration import measure
from expert_cache.host_compute.crossover import TOKEN_COUNTS, MissCosts
from expert_cache.host_compute.host_copies import HostCopies
from expert_cache.host_compute.host_experts import HostExperts
from expert_cache.host_compute.miss_choice import ByCrossover, MissChoice
from expert_cache.host_managed.cache import ExpertCache
from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage.arena import HostArena
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertStore

from .caches import compute_of, mapped_layers
from .stores import FIRST, SILU, STORES, E, routing, split_store

FEW_TOKENS = MissCosts(copy_s=1.0, tokens=(1, 2), host_s=(0.4, 0.8))
"""One token takes the CPU 0.4 of the time of a copy, two 0.8."""


@contextmanager
def layers_of(
    store: ExpertStore, misses: MissChoice, num_slots: int, num_transit: int = 0
) -> Iterator[HostManagedExperts[object]]:
    compute = compute_of(SILU)
    cache = ExpertCache(
        store,
        compute.prepare,
        HostArena(store.num_total + num_transit, store.slot_bytes),
        Capacity.shared(num_slots),
        num_transit,
        find_policy("lru")(len(store.layers), store.num_experts),
        Fetcher(2),
        misses=misses,
    )
    layers: HostManagedExperts[object] = HostManagedExperts(
        cache, compute, host=HostExperts(HostCopies(store, compute.prepare), compute, True)
    )
    yield layers
    cache.check_integrity()
    layers.close()


@pytest.mark.parametrize("num_slots", [1, 3, 10])
def test_the_same_bits_as_the_device_has_the_same_kernel(num_slots: int, tmp_path: Path) -> None:
    store = split_store(tmp_path)
    plain = mapped_layers(store, SILU)
    with layers_of(store, ByCrossover(FEW_TOKENS), num_slots, num_transit=1) as layers:
        for seed in range(30):
            for layer in store.layers:
                step = routing((1, 3, 1, 25)[seed % 4], 2, seed)
                assert torch.equal(layers.run(layer, *step), plain.run(layer, *step))
                layers.check_integrity()
        counters = layers.counters
        assert counters.host_runs.sum() > 0
        assert counters.demand_bytes.sum() > 0


def test_what_the_cpu_computed_comes_later_if_it_is_worth_a_slot(tmp_path: Path) -> None:
    """Otherwise an empty cache would stay empty for ever."""
    store = split_store(tmp_path)
    always = ByCrossover(MissCosts(1.0, (1, 2), (0.0, 0.0)))
    with layers_of(store, always, num_slots=4) as layers:
        for _ in range(200):
            layers.run(FIRST, *routing(1, 2, seed=5))
            if layers.counters.num_hits:
                break
        assert layers.counters.num_hits > 0


class Never:
    def on_host(self, layer: int, missing: Sequence[int], counts: Sequence[int], num_coming: int) -> list[int]:
        return []

    def stays(self, layer: int, expert: int) -> bool:
        return False


def test_a_service_that_leaves_nothing_changes_nothing(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    with layers_of(store, Never(), num_slots=3) as layers:
        layers.run(FIRST, *routing(20))
        assert layers.counters.host_runs.sum() == 0
        assert layers.counters.num_misses == E


def test_many_tokens_are_copied_and_few_computed() -> None:
    service = ByCrossover(FEW_TOKENS)
    assert service.on_host(FIRST, [0, 2, 4], [1, 50, 1], 0) == [0, 4]
    assert service.on_host(FIRST, [2], [50], 0) == []
    assert not service.stays(FIRST, 2)


@pytest.mark.parametrize("layout", STORES)
def test_calibration_measures_real_reads_and_the_real_kernel(layout: str, tmp_path: Path) -> None:
    make, activation = STORES[layout]
    store, compute, fetcher = make(tmp_path), compute_of(activation), Fetcher(2)
    lane, waits = HostExperts(HostCopies(store, compute.prepare), compute, beside_device=True), []
    costs = measure(store, HostArena(1, store.slot_bytes), fetcher, lane, torch.float32, lambda: waits.append(1))
    assert costs.tokens == TOKEN_COUNTS
    assert costs.copy_s > 0
    assert min(costs.host_s) > 0
    assert waits
    fetcher.close()
    lane.close()


def test_calibration_on_a_damaged_file_says_so(tmp_path: Path) -> None:
    store, compute, fetcher = split_store(tmp_path), compute_of(SILU), Fetcher()
    lane = HostExperts(HostCopies(store, compute.prepare), compute, beside_device=True)
    for file in tmp_path.glob("*.safetensors"):
        os.truncate(file, 200)
    with pytest.raises(ExpertReadError, match="truncated"):
        measure(store, HostArena(1, store.slot_bytes), fetcher, lane, torch.float32, lambda: None)
    fetcher.close()
    lane.close()
