"""What the system says about pages in memory, and that experts are computed in place only while they are there."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from expert_cache.host_compute.host_copies import HostCopies
from expert_cache.host_compute.host_experts import HostExperts
from expert_cache.host_compute.miss_choice import FromPageCache
from expert_cache.host_managed.cache import ExpertCache
from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.policies import find_policy
from expert_cache.running.local_experts import RegroupedExperts
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage import expert_file, page_cache
from expert_cache.storage.arena import HostArena
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.safetensors_file import stored_tensors
from expert_cache.storage.store import ExpertStore, StoredTensor

from .caches import compute_of, mapped_layers
from .stores import DECODER_LAYERS, FIRST, LAYERS, SECOND, SILU, E, Part, routing, split_store

PAGE = mmap.PAGESIZE


def forget(file: Path) -> None:
    """Out of the page cache, as far as nobody has it mapped and touched."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def remember(file: Path) -> None:
    file.read_bytes()


def test_whole_pages_around_a_run() -> None:
    assert page_cache.pages_of(10 * PAGE + 5, 100) == (10 * PAGE, PAGE)
    assert page_cache.pages_of(10 * PAGE, 2 * PAGE) == (10 * PAGE, 2 * PAGE)
    assert page_cache.pages_of(11 * PAGE - 1, 2) == (10 * PAGE, 2 * PAGE)


def test_pages_are_seen_coming_and_going(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(64 * PAGE))
    forget(file)
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m,
    ):
        memory = torch.frombuffer(m, dtype=torch.uint8)
        span = (memory.data_ptr(), 64 * PAGE)
        assert not page_cache.is_cached([span])
        remember(file)
        assert page_cache.is_cached([span])
        total = int(memory.sum())
        page_cache.let_go([span])
        assert page_cache.is_cached([span])
        assert int(memory.sum()) == total
        page_cache.let_go([span])
        forget(file)
        assert not page_cache.is_cached([span])
        del memory


def test_pages_beyond_the_end_cannot_be_mapped(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 * PAGE))
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m,
    ):
        memory = torch.frombuffer(m, dtype=torch.uint8)
        assert page_cache.map_in([(memory.data_ptr(), 4 * PAGE)])
        page_cache.let_go([(memory.data_ptr(), 4 * PAGE)])
        os.truncate(file, PAGE)
        assert page_cache.map_in([(memory.data_ptr(), PAGE)])
        assert not page_cache.map_in([(memory.data_ptr(), 4 * PAGE)])
        del memory


def test_another_users_file_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    assert page_cache.tells_about(file)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not page_cache.tells_about(file)
    assert not page_cache.tells_about(tmp_path / "absent")


@contextmanager
def in_place_layers(
    store: ExpertStore, num_slots: int = 2, dtype: torch.dtype = torch.float32
) -> Iterator[HostManagedExperts[object]]:
    """A cache with the page cache in sight."""
    compute = compute_of(SILU, dtype)
    copies = HostCopies(store, compute.prepare)
    arena = HostArena(store.num_total, store.slot_bytes)
    keeper = find_policy("lru")(len(store.layers), store.num_experts)
    misses = FromPageCache(copies)
    cache = ExpertCache(store, compute.prepare, arena, Capacity.shared(num_slots), 0, keeper, Fetcher(2), misses=misses)
    layers: HostManagedExperts[object] = HostManagedExperts(
        cache, compute, host=HostExperts(copies, compute, beside_device=False)
    )
    yield layers
    cache.check_integrity()
    layers.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_from_the_page_cache_from_slots_and_mixed(dtype: torch.dtype, tmp_path: Path) -> None:
    store = split_store(tmp_path, dtype)
    files = [tmp_path / f"layer{layer}.safetensors" for layer in DECODER_LAYERS]
    steps = [(layer, tokens, seed) for seed, tokens in enumerate([1, 2, 1, 2]) for layer in LAYERS]  # none streams

    def outputs(layers: RegroupedExperts[object]) -> list[torch.Tensor]:
        found = []
        for layer, tokens, seed in steps:
            hidden, ids, weights = routing(tokens, 2, seed)
            found.append(layers.run(layer, hidden.to(dtype), ids, weights))
            layers.check_integrity()
        return found

    want = outputs(mapped_layers(store, SILU, dtype))
    del store
    for warm in ([], files[:1], files):
        store = split_store_again(files)
        forget_all(store, files)
        for file in warm:
            remember(file)
        with in_place_layers(store, dtype=dtype) as layers:
            got = outputs(layers)
            counters = layers.counters
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert (counters.host_runs > 0).tolist() == [file in warm for file in files]
            assert (counters.demand_bytes == 0).tolist() == [file in warm for file in files]


def forget_all(store: ExpertStore, files: list[Path]) -> None:
    """Opening a file has read and mapped some pages ahead."""
    copies = HostCopies(store, lambda w: w)
    for layer in LAYERS:
        for expert in range(E):
            copies.let_go(layer, expert)
    for file in files:
        forget(file)
    copies.close()


def split_store_again(files: list[Path]) -> ExpertStore:
    """The files as they are, mapped anew."""
    tensors: dict[int, dict[Part, StoredTensor]] = {}
    for layer, file in zip(DECODER_LAYERS, files, strict=True):
        found = list(stored_tensors(file, lambda name: True))
        tensors[layer] = {(t.name.split(".")[1], int(t.name.split(".")[0])): t for t in found}
    return ExpertStore(tensors, E)


def test_what_the_page_cache_holds_is_not_brought_ahead_of_time(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    with in_place_layers(store, num_slots=6) as layers:
        remember(tmp_path / "layer7.safetensors")
        layers.cache.prefetch(SECOND, [0, 1], [1.0, 1.0])
        layers.run(SECOND, *routing(1))
        assert layers.counters.prefetch_bytes.sum() == 0
        assert layers.counters.host_runs[1] == 2


def test_a_stream_reads_what_the_page_cache_holds_too(tmp_path: Path) -> None:
    """Its reads go on beside the computing; mapping pages would take the CPU's time."""
    store = split_store(tmp_path)
    remember(tmp_path / "layer3.safetensors")
    with in_place_layers(store) as layers:
        layers.run(FIRST, *routing(20))
        assert layers.counters.host_runs[0] == 0
        assert layers.counters.demand_bytes[0] > 0


def packed(folder: Path) -> tuple[ExpertStore, Path]:
    path = folder / "experts.bin"
    expert_file.write(split_store(folder), path, "source", lambda: None)
    return expert_file.read(path)[0], path


def most_experts(layers: HostManagedExperts[object]) -> Mapping[int, ExpertReadError]:
    """Token t uses expert t alone; one expert is left out, so that it is no stream."""
    hidden, _, weights = routing(E - 1, choices=1)
    layers.run(FIRST, hidden, torch.arange(E - 1)[:, None], weights)
    layers.check_integrity()
    return layers.take_failures()


def test_a_flipped_byte_in_the_page_cache_is_noticed(tmp_path: Path) -> None:
    store, path = packed(tmp_path)
    read = store.reads(FIRST, 2)[0]
    with path.open("r+b") as stream:
        stream.seek(read.offset + 8)
        stream.write(b"\x7f\x7f")
    store = expert_file.read(path)[0]
    remember(path)
    with in_place_layers(store) as layers:
        failures = most_experts(layers)
        assert list(failures) == [2]
        assert "checksum" in failures[2].message
        assert str(path) in failures[2].message
        assert layers.counters.host_runs[0] == E - 1


def test_a_truncated_file_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    """Touching a mapped page beyond the end would be SIGBUS."""
    store = split_store(tmp_path)
    file = tmp_path / "layer3.safetensors"
    remember(file)
    with in_place_layers(store) as layers:
        assert most_experts(layers) == {}
        os.truncate(file, store.reads(FIRST, 2)[0].offset + 100)
        failures = most_experts(layers)
        assert failures
        assert all(str(file) in f.message for f in failures.values())
        assert any("changed while it was in use" in f.message for f in failures.values())


def test_a_file_written_to_is_refused(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    file = tmp_path / "layer3.safetensors"
    with in_place_layers(store) as layers:
        assert most_experts(layers) == {}
        os.utime(file, ns=(1, 1))
        assert most_experts(layers) == {}
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x7f")
        assert set(most_experts(layers)) == set(range(E - 1))


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    (tmp_path / "layer3.safetensors").unlink()
    with pytest.raises(ExpertReadError, match="cannot be opened"):
        HostCopies(store, lambda w: w)


def test_unclosed_files_are_not_leaked(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with in_place_layers(store) as layers:
        most_experts(layers)
    layers.close()
    assert len(os.listdir("/proc/self/fd")) == before
