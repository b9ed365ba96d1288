"""How fast this machine is at what serving needs, each measured in a second at most. Knows no model."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from expert_cache.storage.direct_io import BLOCK_BYTES, DirectFile
from moe_serve.config.units import MIB
from moe_serve.offload.build import DISK_READERS

CHUNK_BYTES = 8 * MIB
"""Of one read: about an expert."""
MEMORY_BYTES = 256 * MIB
"""Several times any last-level cache."""
NUM_SLICES = 4
"""Of that memory, read in turn: the shorter a run, the likelier one is not disturbed on a busy machine."""
SCRATCH_BYTES = 128 * MIB
MATRIX_ROWS = 1024
MEASURE_S = 1.0
PATIENCE_S = 0.35
"""A measurement ends after this time without a better one."""
BETTER = 0.99
"""A time counts as better if it is below this share of the best one."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes or floating-point operations per second; None: there is no such thing here."""

    memory_bytes_per_s: float
    """Reading memory with all threads: what decoding from memory is bound by."""
    disk_bytes_per_s: float | None
    """Reading the model's files past the page cache, as many readers as the expert cache has."""
    h2d_bytes_per_s: float | None
    d2h_bytes_per_s: float | None
    float32_flops: float
    bfloat16_flops: float


def measure(files: Sequence[Path], num_threads: int, device: torch.device) -> Rates:
    """All rates. `files`: a model's, for the disk; none skips it."""
    torch.set_num_threads(num_threads)
    is_cuda = device.type == "cuda"
    return Rates(
        memory_bytes_per_s=memory_rate(),
        disk_bytes_per_s=disk_rate(files) if files else None,
        h2d_bytes_per_s=link_rate(device, to_device=True) if is_cuda else None,
        d2h_bytes_per_s=link_rate(device, to_device=False) if is_cuda else None,
        float32_flops=matrix_rate(torch.float32, device),
        bfloat16_flops=matrix_rate(torch.bfloat16, device),
    )


def memory_rate() -> float:
    """Bytes per second of summing a block of memory that no cache holds."""
    slices = itertools.cycle(torch.ones(NUM_SLICES, MEMORY_BYTES // NUM_SLICES // 4, dtype=torch.float32))
    return MEMORY_BYTES // NUM_SLICES / _best_s(lambda: next(slices).sum())


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a square matrix product."""
    a = torch.randn(MATRIX_ROWS, MATRIX_ROWS, device=device).to(dtype)

    def multiply() -> None:
        torch.mm(a, a)
        _synchronize(device)

    return 2 * MATRIX_ROWS**3 / _best_s(multiply)


def link_rate(device: torch.device, to_device: bool) -> float:
    """Bytes per second between pinned host memory and a GPU."""
    host = torch.empty(CHUNK_BYTES * 8, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    target, source = (there, host) if to_device else (host, there)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        _synchronize(device)

    return host.nbytes / _best_s(copy)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_s(work: Callable[[], object]) -> float:
    """Shortest time of `work`: the others were disturbed. Within MEASURE_S, or until no better one comes."""
    work()
    best, found, now = float("inf"), 0.0, time.perf_counter()
    end = now + MEASURE_S
    while now < end and (found == 0.0 or now - found < PATIENCE_S):
        start = now
        work()
        now = time.perf_counter()
        if now - start < BETTER * best:
            found = now
        best = min(best, now - start)
    return best


def disk_rate(files: Sequence[Path]) -> float:
    """Bytes per second of reading different parts of these files, for MEASURE_S or until all are read."""
    chunks = iter(_chunks(files))
    lock = threading.Lock()
    start = time.perf_counter()
    done = [0] * DISK_READERS

    def read(reader: int) -> None:
        memory = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        while time.perf_counter() - start < MEASURE_S:
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            file, offset, length = chunk
            file.read(memory[:length], offset, length)
            done[reader] += length

    threads = [threading.Thread(target=read, args=(i,)) for i in range(DISK_READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


@contextmanager
def scratch_file(folder: Path) -> Iterator[list[Path]]:
    """A file to measure the disk of `folder` with, gone afterwards; none where it cannot be written."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".moe-serve-rate-"))
            for _ in range(SCRATCH_BYTES // CHUNK_BYTES):
                file.write(os.urandom(CHUNK_BYTES))
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            yield []
        else:
            yield [Path(file.name)]


def _chunks(files: Sequence[Path]) -> list[tuple[DirectFile, int, int]]:
    """(file, offset, length) of every part, all files in turn, whole blocks only."""
    per_file = []
    for path in files:
        file, size = DirectFile(path), path.stat().st_size // BLOCK_BYTES * BLOCK_BYTES
        per_file.append([(file, at, min(CHUNK_BYTES, size - at)) for at in range(0, size, CHUNK_BYTES)])
    rows = itertools.zip_longest(*per_file)
    return [chunk for row in rows for chunk in row if chunk is not None]
