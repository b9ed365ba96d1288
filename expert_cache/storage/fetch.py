"""Fetcher: brings experts from their files into slots, most urgent first, on threads of its own.

A fetch is read in chunks, and before each chunk the most urgent fetch is chosen anew: what the
router asked for (demand) overtakes what was only predicted (prefetch) within a chunk's time, and a
prefetch moves only while nothing is demanded. A fetch in progress can be promoted or cancelled
(ProMoE's chunked prefetching; ExpertFlow's correction when the router disagrees).
Knows slots as memory and experts as Reads; knows no policy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.store import ExpertStore, Read
from predictors.shape import Key

log = logging.getLogger(__name__)

CHUNK_BYTES = 2 << 20
"""About 1.5 ms of a disk: long enough for its full rate and to keep Python's part small, short enough to wait for."""
DEMAND = float("inf")
"""Urgency of an expert that the router asked for."""
LATER = -1e30
"""Urgency of an expert that is read when nothing else is wanted."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read: `num_bytes` from `offset` of a file to `memory_offset` of the expert's memory."""

    file: Path
    offset: int
    num_bytes: int
    memory_offset: int
    needed: int
    """Bytes that must be there; fewer than num_bytes only in the last block of a file."""
    names: str
    """Tensors of the run this chunk belongs to."""
    is_input: bool
    """It holds a part of what an expert's first product needs: gate, up or their biases."""


def chunks_of(reads: Sequence[Read], chunk_bytes: int) -> tuple[Chunk, ...]:
    """Cut an expert's reads into chunks: those of the first product first, otherwise in file order."""
    chunks = []
    for read in reads:
        first, length = read.span
        end = read.offset + read.num_bytes
        for start in range(0, length, chunk_bytes):
            count = min(chunk_bytes, length - start)
            needed = min(count, end - first - start)
            is_input = _has_input(read, first + start, first + start + count)
            memory_offset = read.memory_offset + start
            chunks.append(Chunk(read.file, first + start, count, memory_offset, needed, read.names, is_input))
    return tuple(sorted(chunks, key=lambda chunk: not chunk.is_input))


def _has_input(read: Read, start: int, end: int) -> bool:
    """Bytes `start` to `end` of the file hold something other than the down projection."""
    return any(
        not part.startswith("down") and t.offset < end and t.offset + t.tensor.nbytes > start
        for part, t in read.tensors
    )


@dataclass(eq=False, slots=True)
class Fetch:
    """One expert on its way into memory. Its fields are read by other threads only once `is_done`."""

    key: Key
    name: str
    """What errors call the expert."""
    reads: tuple[Read, ...]
    memory: memoryview
    urgency: float
    """DEMAND, or less: the larger, the earlier."""
    checksum: str | None = None
    chunks: tuple[Chunk, ...] = ()
    num_issued: int = 0
    num_read: int = 0
    num_bytes_read: int = 0
    num_inputs_missing: int = 0
    """Chunks of the first product that have not been read."""
    is_cancelled: bool = False
    is_done: bool = False
    """Finished, failed or cancelled: no thread will touch the memory any more."""
    error: ExpertReadError | None = None
    order: int = 0

    @classmethod
    def of(cls, store: ExpertStore, key: Key, memory: memoryview, urgency: float) -> Fetch:
        """An expert of `store` on its way into `memory`, which is laid out as the store's reads say."""
        return cls(key, store.name(*key), store.reads(*key), memory, urgency, store.checksum(*key))

    @property
    def is_busy(self) -> bool:
        """A thread is reading one of its chunks, or checking it."""
        return self.num_issued > self.num_read

    @property
    def wants_reading(self) -> bool:
        """It has chunks that no thread has taken."""
        return self.num_issued < len(self.chunks) and not self.is_cancelled and self.error is None


class Fetcher:
    """A queue of fetches, all of one store, and the threads that work on it."""

    def __init__(self, num_threads: int = 1, open_file: Callable[[Path], DirectFile] = DirectFile) -> None:
        self.num_bytes = 0
        self.busy_s = 0.0
        """Time during which at least one read was in progress."""
        self._open_file = open_file
        self._files: dict[Path, DirectFile] = {}
        self._chunks: dict[Key, tuple[tuple[Chunk, ...], int]] = {}
        """Of every expert that was ever fetched: its chunks, and how many hold inputs."""
        self._queue: list[Fetch] = []
        self._changed = threading.Condition()
        self._num_reading = 0
        self._guess: Chunk | None = None
        """The chunk that is being read on a prediction."""
        self._reading_since = 0.0
        self._num_submitted = 0
        self._closing = False
        self._threads = [threading.Thread(target=self._work, name=f"moe-serve-fetch-{i}") for i in range(num_threads)]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    # ---- any thread -----------------------------------------------------------------------------

    def submit(self, fetch: Fetch) -> None:
        """Queue a fetch."""
        if fetch.key not in self._chunks:
            chunks = chunks_of(fetch.reads, CHUNK_BYTES)
            self._chunks[fetch.key] = chunks, sum(chunk.is_input for chunk in chunks)
        fetch.chunks, fetch.num_inputs_missing = self._chunks[fetch.key]
        with self._changed:
            assert not self._closing
            self._num_submitted += 1
            fetch.order = self._num_submitted
            self._queue.append(fetch)
            self._changed.notify_all()

    def promote(self, fetch: Fetch) -> None:
        """Turn a prefetch into a demand."""
        with self._changed:
            fetch.urgency = DEMAND
            self._changed.notify_all()

    def cancel(self, fetch: Fetch) -> None:
        """Stop a fetch; returns when no thread touches its memory any more (a chunk's time at most)."""
        with self._changed:
            fetch.is_cancelled = True
            self._changed.wait_for(lambda: fetch.is_done or not fetch.is_busy)
            self._finish(fetch)

    def wait_until(self, is_enough: Callable[[], bool]) -> None:
        """Block until something about fetches holds: one is done, or has its inputs."""
        with self._changed:
            self._changed.wait_for(is_enough)

    def activity(self) -> tuple[int, float]:
        """Bytes read so far, and seconds during which something was being read, to this moment."""
        with self._changed:
            running_s = time.perf_counter() - self._reading_since if self._num_reading else 0.0
            return self.num_bytes, self.busy_s + running_s

    def close(self) -> None:
        """Drop what is queued and end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for file in self._files.values():
            file.close()
        self._files.clear()

    # ---- worker threads -------------------------------------------------------------------------

    def _work(self) -> None:
        while (task := self._next_chunk()) is not None:
            fetch, chunk = task
            self._chunk_done(fetch, chunk, self._try_to_read(fetch, chunk))

    def _next_chunk(self) -> tuple[Fetch, Chunk] | None:
        with self._changed:
            while not self._closing:
                waiting = [f for f in self._queue if f.wants_reading and self._may_start(f)]
                if waiting:
                    fetch = max(waiting, key=lambda f: (f.urgency, -f.order))
                    chunk = fetch.chunks[fetch.num_issued]
                    fetch.num_issued += 1
                    if fetch.urgency < DEMAND:
                        self._guess = chunk
                    self._start_clock()
                    return fetch, chunk
                self._changed.wait()
            return None

    def _may_start(self, fetch: Fetch) -> bool:
        """One thread at most reads what was only predicted, so that a demand finds another one free."""
        return fetch.urgency == DEMAND or self._guess is None

    def _try_to_read(self, fetch: Fetch, chunk: Chunk) -> ExpertReadError | None:
        memory = fetch.memory[chunk.memory_offset : chunk.memory_offset + chunk.num_bytes]
        try:
            self._file(chunk.file).read(memory, chunk.offset, chunk.needed)
        except ExpertReadError as error:
            return ExpertReadError(f"{fetch.name}: {error.message} (tensors {chunk.names})")
        except Exception as error:  # a thread that dies here would leave the engine waiting for ever
            log.exception("a reading thread failed")
            return ExpertReadError(f"{fetch.name}: {chunk.file}: {type(error).__name__} while reading")
        return None

    def _file(self, path: Path) -> DirectFile:
        with self._changed:
            if path not in self._files:
                self._files[path] = self._open_file(path)
            return self._files[path]

    def _chunk_done(self, fetch: Fetch, chunk: Chunk, error: ExpertReadError | None) -> None:
        with self._changed:
            self._stop_clock()
            if self._guess is chunk:
                self._guess = None
            self.num_bytes += chunk.num_bytes
            fetch.num_bytes_read += chunk.num_bytes
            fetch.error = fetch.error or error
            fetch.num_inputs_missing -= chunk.is_input and error is None
            is_last = fetch.num_read + 1 == len(fetch.chunks)
            if not is_last or fetch.error or fetch.is_cancelled:
                fetch.num_read += 1
                if fetch.error and not fetch.is_busy:
                    self._finish(fetch)
                elif fetch.is_cancelled or fetch.num_inputs_missing == 0:
                    self._changed.notify_all()
                return
        error = self._verify(fetch)  # outside the lock: it reads the whole expert once
        with self._changed:
            fetch.num_read += 1
            fetch.error = error
            self._finish(fetch)

    def _verify(self, fetch: Fetch) -> ExpertReadError | None:
        """What is wrong with a completely read expert, if anything."""
        try:
            for read in fetch.reads:
                self._file(read.file).check_unchanged()
        except ExpertReadError as failure:
            return ExpertReadError(f"{fetch.name}: {failure.message}")
        if fetch.checksum is None or fetch.checksum == checksum_of(fetch.reads, fetch.memory):
            return None
        where = "; ".join(f"{r.file} at byte {r.offset}, tensors {r.names}" for r in fetch.reads)
        return ExpertReadError(
            f"{fetch.name}: the checksum does not match, the data on disk is damaged ({where});"
            " make the expert file again with `moe-serve pack`"
        )

    def _finish(self, fetch: Fetch) -> None:
        """With the lock held: mark the fetch done; no thread works on it any more."""
        fetch.is_done = True
        if fetch in self._queue:
            self._queue.remove(fetch)
        self._changed.notify_all()

    def _start_clock(self) -> None:
        if self._num_reading == 0:
            self._reading_since = time.perf_counter()
        self._num_reading += 1

    def _stop_clock(self) -> None:
        self._num_reading -= 1
        if self._num_reading == 0:
            self.busy_s += time.perf_counter() - self._reading_since


def checksum_of(reads: Sequence[Read], memory: memoryview) -> str:
    """xxh3-64 of an expert's bytes in file order, in hexadecimal; `memory` is laid out as `reads` says."""
    digest = xxhash.xxh3_64()
    for read in reads:
        start = read.memory_offset + read.offset - read.span[0]
        digest.update(memory[start : start + read.num_bytes])
    return digest.hexdigest()
