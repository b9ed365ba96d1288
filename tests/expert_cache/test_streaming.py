"""Streaming: which steps stream, in what order, what stays in the pools, and that the bits stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from expert_cache.host_managed.cache import ExpertCache
from expert_cache.host_managed.streaming import Streaming
from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage.arena import HostArena
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.fetch import Fetcher
from predictors.shape import MoELayer

from .caches import SteppedFetcher, cached_layers, mapped_layers
from .stores import FIRST, LAYERS, SECOND, SILU, E, routing, split_store

EVERYTHING = list(range(E))


def test_nearly_all_of_a_layers_experts_make_a_stream(tmp_path: Path) -> None:
    streaming = Streaming(split_store(tmp_path))
    assert streaming.suits(5)
    assert not streaming.suits(4)


def test_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    streaming = Streaming(store)
    places = [store.reads(FIRST, e)[0].offset for e in streaming.in_file_order(FIRST, EVERYTHING)]
    assert places == sorted(places)
    assert set(streaming.in_file_order(FIRST, [4, 1])) == {1, 4}
    ahead = list(streaming.ahead(FIRST))
    assert {layer for layer, _ in ahead} == {1}
    assert [e for _, e in ahead] == streaming.in_file_order(SECOND, EVERYTHING)
    assert list(streaming.ahead(SECOND)) == []


@contextmanager
def stepped_cache(folder: Path, slots: Capacity, num_transit: int) -> Iterator[tuple[ExpertCache, SteppedFetcher]]:
    store, fetcher = split_store(folder), SteppedFetcher()
    arena = HostArena(store.num_total, store.slot_bytes)
    cache = ExpertCache(store, lambda w: w, arena, slots, num_transit, find_policy("lru")(2, E), fetcher)
    yield cache, fetcher
    cache.check_integrity()
    cache.close()


def run_all(cache: ExpertCache, layer: MoELayer, experts: list[int]) -> list[int]:
    """A layer's step; the order in which experts ran."""
    wanted, ran = cache.acquirer.acquire(layer, experts, [1] * len(experts)), []
    while wanted.ready or wanted.is_pending:
        for expert in wanted.next_ready():
            cache.acquirer.release(wanted, expert)
            ran.append(expert)
        if not wanted.ready and wanted.is_pending:
            cache.acquirer.wait(wanted)
        cache.check_integrity()
    return ran


def test_a_stream_leaves_the_pools_alone_and_reads_the_next_layer_meanwhile(tmp_path: Path) -> None:
    with stepped_cache(tmp_path, Capacity.per_layer([2, 2]), num_transit=2) as (cache, fetcher):
        for layer in LAYERS:
            run_all(cache, layer, [1])
            run_all(cache, layer, [3])
        cache.policy.keep_values = lambda layer: torch.arange(E).eq(1).add(torch.arange(E).eq(3)).double().numpy()  # type: ignore[method-assign]
        kept = cache.table.slot_of.copy()
        for _ in range(2):
            assert sorted(run_all(cache, FIRST, EVERYTHING)) == EVERYTHING
            assert len(cache.in_flight.of_layer(SECOND)) == 2
            while fetcher.step():
                pass
            before = cache.counters.prefetch_hits[1]
            assert sorted(run_all(cache, SECOND, EVERYTHING)) == EVERYTHING
            assert cache.counters.prefetch_hits[1] == before + 2
        assert (cache.table.slot_of == kept).all()
        assert cache.counters.wasted_bytes.sum() == 0


def test_what_travels_runs_before_what_stays(tmp_path: Path) -> None:
    """Each run in the ring frees a slot that the stream needs; the pools' experts fill the waiting."""
    with stepped_cache(tmp_path, Capacity.per_layer([2, 2]), num_transit=2) as (cache, fetcher):
        run_all(cache, SECOND, [0, 1])
        run_all(cache, FIRST, EVERYTHING)
        while fetcher.step():
            pass
        order = run_all(cache, SECOND, EVERYTHING)
        assert set(order[:2]) == {2, 3}


def test_an_empty_cache_is_filled_ahead(tmp_path: Path) -> None:
    with stepped_cache(tmp_path, Capacity.shared(10), num_transit=0) as (cache, _):
        wanted = cache.acquirer.acquire(FIRST, EVERYTHING, [1] * E)
        assert len(wanted.in_flight) == E
        assert len(cache.in_flight.of_layer(SECOND)) == E
        cache.acquirer.abandon(wanted)


@pytest.mark.parametrize("num_transit", [0, 1, 2, 4])
@pytest.mark.parametrize("slots", [Capacity.shared(1), Capacity.shared(3), Capacity.per_layer([1, 2])], ids=str)
def test_the_same_bits_and_nothing_forgotten(slots: Capacity, num_transit: int, tmp_path: Path) -> None:
    store = split_store(tmp_path)
    plain = mapped_layers(store, SILU)
    with cached_layers(store, SILU, slots, num_transit=num_transit, fetcher=Fetcher(2)) as layers:
        for seed in range(12):
            tokens, choices = ((40, 2), (1, 2), (3, E))[seed % 3]
            for layer in store.layers:
                step = routing(tokens, choices, seed)
                assert torch.equal(layers.run(layer, *step), plain.run(layer, *step))
                layers.check_integrity()


def test_a_layer_that_needs_less_than_was_read_ahead(tmp_path: Path) -> None:
    """What the router does not want is cancelled or let go, and its bytes are counted as wasted."""
    with stepped_cache(tmp_path, Capacity.per_layer([1, 1]), num_transit=2) as (cache, fetcher):
        run_all(cache, FIRST, EVERYTHING)
        while fetcher.step():
            pass
        assert run_all(cache, SECOND, [4]) == [4]
        assert cache.counters.wasted_bytes[1] == 2 * cache.store.expert_bytes


def test_a_step_that_fails_in_the_middle_leaves_nothing_pinned(tmp_path: Path) -> None:
    with stepped_cache(tmp_path, Capacity.per_layer([2, 2]), num_transit=2) as (cache, fetcher):
        run_all(cache, FIRST, [0, 1])
        wanted = cache.acquirer.acquire(FIRST, EVERYTHING, [1] * E)
        fetcher.step()
        cache.acquirer.release(wanted, next(iter(wanted.ready)))
        cache.acquirer.abandon(wanted)
        assert not cache.table.pins.any()
        assert sorted(run_all(cache, FIRST, EVERYTHING)) == EVERYTHING


class Unreadable(DirectFile):
    def read(self, memory: memoryview, offset: int, needed: int) -> None:
        raise ExpertReadError(f"{self.path}: read error")


def test_read_errors_fail_every_expert_of_a_stream_once(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    with cached_layers(store, SILU, Capacity.shared(2), num_transit=2, fetcher=Fetcher(2, Unreadable)) as layers:
        hidden, ids, weights = routing(E, E)
        layers.run(FIRST, hidden, ids, weights)
        assert set(layers.take_failures()) == set(range(E))
        layers.check_integrity()
