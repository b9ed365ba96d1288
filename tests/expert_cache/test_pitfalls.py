"""Mistakes that public offloading systems have made, each as a test (shared notes: offload.md, section 7.3).

Elsewhere: experts evicted in use, overflow, resizing and failing reads in test_cache_states.py; a batch that needs
more experts than there are slots in test_layers.py; a profile of another model in tests/families/test_offload.py.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from expert_cache.host_managed.cache import ExpertCache
from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage import fetch
from expert_cache.storage.arena import HostArena
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.fetch import DEMAND, Fetch
from expert_cache.storage.store import ExpertStore
from predictors.shape import Key, MoELayer

from .caches import SteppedFetcher, cached_layers, mapped_layers
from .stores import FIRST, LAYERS, SECOND, SILU, E, H, matrices, routing, split_store, stored


def cache_with(store: ExpertStore, slots: Capacity, num_transit: int = 0) -> tuple[ExpertCache, SteppedFetcher]:
    arena = HostArena(store.num_total + num_transit, store.slot_bytes)
    fetcher = SteppedFetcher()
    return ExpertCache(store, lambda w: w, arena, slots, num_transit, find_policy("lru")(2, E), fetcher), fetcher


def run_out(cache: ExpertCache, layer: MoELayer, experts: list[int]) -> None:
    """One layer's step, every expert run as soon as it is there."""
    wanted = cache.acquirer.acquire(layer, experts, [1] * len(experts))
    while wanted.ready or wanted.is_pending:
        for expert in list(wanted.ready):
            cache.acquirer.release(wanted, expert)
        if wanted.is_pending:
            cache.acquirer.wait(wanted)


def bytes_of(store: ExpertStore, *keys: Key) -> int:
    return sum(read.span[1] for key in keys for read in store.reads(*key))


def test_an_expert_on_its_way_is_not_fetched_twice(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    cache, fetcher = cache_with(store, Capacity.shared(4))
    cache.prefetch(FIRST, [1, 2], [2.0, 1.0])
    cache.prefetch(FIRST, [2, 1], [2.0, 1.0])
    run_out(cache, FIRST, [1, 2])
    assert fetcher.num_bytes == bytes_of(store, (FIRST, 1), (FIRST, 2))
    assert cache.counters.late_prefetches.sum() == 2


def test_waves_read_every_expert_once(tmp_path: Path) -> None:
    """omlx read prompts' experts seventeen times over: here a step reads each expert it needs once."""
    store = split_store(tmp_path)
    cache, fetcher = cache_with(store, Capacity.shared(2))
    run_out(cache, FIRST, list(range(E)))
    assert fetcher.num_bytes == bytes_of(store, *((FIRST, e) for e in range(E)))


def test_overflow_keeps_what_it_can(tmp_path: Path) -> None:
    """The same wide step again: residents run first, so an LRU sweep does not evict each just before its use."""
    store = split_store(tmp_path)
    cache, _ = cache_with(store, Capacity.shared(3))
    run_out(cache, FIRST, list(range(E)))
    run_out(cache, FIRST, list(range(E)))
    assert cache.counters.hits.sum() >= 2


def test_a_prefetched_expert_outlives_an_older_one(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    cache, fetcher = cache_with(store, Capacity.shared(3))
    run_out(cache, SECOND, [0])
    run_out(cache, SECOND, [4])
    cache.prefetch(FIRST, [1], [1.0])
    while fetcher.step():
        pass
    run_out(cache, SECOND, [2])
    assert cache.table.slot_of[0, 1] >= 0, "the prefetched expert was evicted before its use"
    assert cache.table.slot_of[1, 0] < 0
    run_out(cache, FIRST, [1])
    assert cache.counters.prefetch_hits.sum() == 1
    assert cache.counters.wasted_bytes.sum() == 0


def test_a_prefetch_evicts_nobody(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    cache, fetcher = cache_with(store, Capacity.uniform(1, 2), num_transit=1)
    run_out(cache, FIRST, [0])
    cache.prefetch(FIRST, [1, 2], [2.0, 1.0])
    while fetcher.step():
        pass
    assert cache.table.slot_of[0, 0] >= 0
    run_out(cache, FIRST, [0])  # the router wants the old one after all: what was prefetched goes
    assert cache.counters.hits.sum() == 1
    assert cache.table.slot_of[0, 1] < 0
    assert cache.counters.wasted_bytes.sum() == store.expert_bytes


def test_an_expert_used_once_passes_through_without_displacing_a_better_one(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    arena = HostArena(store.num_total + 1, store.slot_bytes)
    cache = ExpertCache(
        store, lambda w: w, arena, Capacity.uniform(1, 2), 1, find_policy("lfu")(2, E), SteppedFetcher()
    )
    for _ in range(5):
        run_out(cache, FIRST, [0])
    run_out(cache, FIRST, [4])
    assert cache.table.slot_of[0, 0] >= 0
    assert cache.table.slot_of[0, 4] < 0
    cache.check_integrity()


def test_demand_overtakes_a_prefetch_between_two_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 4096)
    store, arena, fetcher = split_store(tmp_path), HostArena(3, 1 << 20), SteppedFetcher()
    guess = Fetch.of(store, (FIRST, 0), arena.landing(0), 1.0)
    better = Fetch.of(store, (FIRST, 1), arena.landing(1), 2.0)
    demand = Fetch.of(store, (SECOND, 2), arena.landing(2), DEMAND)
    fetcher.submit(guess)
    fetcher.step()
    fetcher.submit(better)
    fetcher.submit(demand)
    fetcher.wait_until(lambda: demand.is_done)
    assert guess.num_read == 1
    assert better.num_read == 0
    fetcher.wait_until(lambda: better.is_done)
    assert not guess.is_done
    fetcher.promote(guess)
    fetcher.wait_until(lambda: guess.is_done)
    assert fetcher.num_bytes == bytes_of(store, (FIRST, 0), (FIRST, 1), (SECOND, 2))


def test_a_cancelled_prefetch_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 4096)
    store, arena, fetcher = split_store(tmp_path), HostArena(1, 1 << 20), SteppedFetcher()
    guess = Fetch.of(store, (FIRST, 0), arena.landing(0), 1.0)
    fetcher.submit(guess)
    fetcher.step()
    fetcher.cancel(guess)
    assert not fetcher.step()
    assert guess.num_bytes_read == 4096


def test_experts_without_tokens_are_not_touched(tmp_path: Path) -> None:
    """NaN in an expert nobody chose must not reach anyone."""
    gate, up, down = (m.clone() for m in matrices(3))
    for matrix in (gate, up, down):
        matrix[1] = float("nan")
    parts = {f"{e}.{n}": m[e].contiguous() for n, m in (("gate", gate), ("up", up), ("down", down)) for e in range(E)}
    save_file(parts, tmp_path / "nan.safetensors")
    tensors = stored(tmp_path / "nan.safetensors")
    store = ExpertStore({3: {(t.name.split(".")[1], int(t.name.split(".")[0])): t for t in tensors}}, E)
    hidden, ids, weights = routing(12)
    ids[ids == 1] = 0
    with cached_layers(store, SILU, Capacity.shared(2)) as layers:
        for source in (layers, mapped_layers(store, SILU)):
            out = source.run(FIRST, hidden, ids, weights)
            assert out.shape == (12, H)
            assert torch.isfinite(out).all()


def drop_cached(file: Path) -> None:
    """Have the kernel forget the file's pages, as far as nothing has them mapped."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(file: Path) -> bytes:
    """One byte per page: odd if it is in the page cache."""
    memory = torch.from_numpy(np.memmap(file, np.uint8, "c"))
    pages = (ctypes.c_ubyte * -(-memory.nbytes // mmap.PAGESIZE))()
    size = ctypes.c_size_t(memory.nbytes)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.data_ptr()), size, pages) == 0
    return bytes(pages)


def test_reading_leaves_nothing_in_the_page_cache(tmp_path: Path) -> None:
    """One copy of an expert in memory, not two: the budget would be a lie."""
    path, arena = tmp_path / "file", HostArena(1, 1 << 20)
    content = os.urandom(1 << 20)
    path.write_bytes(content)
    drop_cached(path)
    assert not any(page & 1 for page in cached_pages(path)), "the test cannot fail: the file is cached"
    file = DirectFile(path)
    file.read(arena.landing(0), 0, 1 << 20)
    assert bytes(arena.landing(0)) == content
    assert not any(page & 1 for page in cached_pages(path))
    file.close()


def test_files_are_opened_for_reading_only(tmp_path: Path) -> None:
    """Evicting a clean expert writes nothing back: it could not."""
    store = split_store(tmp_path)
    with cached_layers(store, SILU, Capacity.shared(1)) as layers:
        layers.run(FIRST, *routing(9))
        descriptor = layers.cache.fetcher._files[tmp_path / "layer3.safetensors"]._fd
        flags = int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0], 8)
        assert flags & 3 == 0


def test_a_layers_pool_is_not_swept_by_the_others(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    cache, _ = cache_with(store, Capacity.uniform(1, 2))
    run_out(cache, LAYERS[0], [2])
    run_out(cache, LAYERS[1], [0, 1, 3])
    run_out(cache, LAYERS[0], [2])
    assert cache.counters.hits.tolist() == [1, 0]
