"""DiskTier: writes pages and states of finished turns behind the steps, and loads them before a sequence needs them.

Two threads. The writer reads pages that stay findable; one that was given to another sequence meanwhile has another
version, and what was read of it is dropped. The loader fills pages that the engine's thread has set aside. So no step
waits for the disk. All methods belong to the engine's thread. Knows hashes, pages and rows; knows no requests.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from moe_serve.prefix_disk.files import Kind
from moe_serve.prefix_disk.folder import PrefixFolder
from moe_serve.prefix_disk.tensors import PageBytes
from moe_serve.scheduling.kv_pages import PagePool
from moe_serve.scheduling.prefixes import Prefixes
from moe_serve.scheduling.sequence import Sequence
from moe_serve.scheduling.stats import DiskTotals

log = logging.getLogger(__name__)

MAX_QUEUED = 256
"""Sequences that wait to be written; further ones are not kept."""
CLOSE_S = 5.0
"""A server that ends writes for this long at most."""
BATCH_BYTES = 1 << 19
"""Pages that are read, and then copied to their places at once: they are still in the processor's cache then."""
PAGES_PER_RUNNING = 4
"""Pages that loading leaves for each running sequence."""


@dataclass(slots=True)
class Load:
    """Pages on their way from the disk, for one sequence."""

    seq: Sequence
    held: list[int]
    """Pages of the sequence's prefix that are in memory: held, so that loading does not evict them."""
    pages: list[int]
    """Set aside for `digests`, in order."""
    digests: list[bytes]
    state: tuple[bytes, int] | None = None
    """Digest and row of the state to load."""
    done: Future[int] = field(default_factory=Future)
    """Ends with the number of pages that were loaded."""


class DiskTier:
    """Between the pages in memory and a PrefixFolder."""

    def __init__(self, folder: PrefixFolder, content: PageBytes, pool: PagePool, prefixes: Prefixes) -> None:
        self._folder = folder
        self._content = content
        self._pool = pool
        self._prefixes = prefixes
        self._queue: queue.Queue[list[tuple[Kind, bytes]] | None] = queue.Queue(MAX_QUEUED)
        self._loader = ThreadPoolExecutor(1, "moe-serve-prefix-load")
        self._is_closing = False
        self._writer = threading.Thread(target=self._write_all, name="moe-serve-prefix-write", daemon=True)
        self._writer.start()

    @property
    def totals(self) -> DiskTotals:
        """Live; any thread may read it."""
        return self._folder.totals

    # ---- to the disk ------------------------------------------------------------------------------

    def keep(self, seq: Sequence) -> None:
        """Have the pages of a sequence that ends written, and the states saved at their ends."""
        digests = self._prefixes.offered_hashes(seq) if self._prefixes.is_on else []
        kinds = ((Kind.PAGE, self._pool), (Kind.STATE, self._prefixes.saved))
        items = [(kind, digest) for digest in digests for kind, known in kinds if known.version_of(digest) is not None]
        if items and not self._queue.full():
            self._queue.put(items)

    def _write_all(self) -> None:
        while (items := self._queue.get()) is not None:
            try:
                self._write_some(items)
            except Exception:
                log.exception("prefixes are no longer written to disk")
                self._is_closing = True
            self._queue.task_done()

    def _write_some(self, items: list[tuple[Kind, bytes]]) -> None:
        for item in items:
            if not self._is_closing:
                self._write(*item)
        self._folder.touch(items)

    def _write(self, kind: Kind, digest: bytes) -> None:
        is_page = kind is Kind.PAGE
        known = (self._pool if is_page else self._prefixes.saved).version_of
        before = known(digest)
        if before is None or self._folder.has(kind, digest):
            return
        content = (self._content.read_page if is_page else self._content.read_state)(before[0])
        if known(digest) == before:
            self._folder.write(kind, digest, content)

    def flush(self) -> None:
        """Wait until all that was kept is written."""
        self._queue.join()

    # ---- from the disk ------------------------------------------------------------------------------

    def begin_load(self, seq: Sequence, num_running: int, wake: Callable[[], None]) -> Load | None:
        """Start to load what of a new sequence's prefix is on disk and not in memory; None if nothing is, or no page is
        free. `wake` is called on another thread when it is done."""
        hashes = self._prefixes.usable_hashes(seq) if self._prefixes.is_on else []
        held = self._pool.match(hashes)
        end, needs_state = self._reachable(hashes, len(held))
        if end <= len(held) and not needs_state:
            return None
        held = held[:end]
        self._pool.share(held)
        count = max(0, min(end - len(held), self._pool.num_free - PAGES_PER_RUNNING * num_running))
        pages = self._pool.allocate(count) or []
        load = Load(seq, held, pages, hashes[len(held) : len(held) + count])
        if needs_state and len(held) + count == end and (row := self._prefixes.saved.take()) is not None:
            load.state = hashes[end - 1], row
        load.done = self._loader.submit(self._load, load)
        load.done.add_done_callback(lambda _: wake())
        return load

    def _reachable(self, hashes: list[bytes], num_held: int) -> tuple[int, bool]:
        """Pages from the beginning that are here or on disk, and whether the state at their end is on disk alone."""
        end = num_held
        while end < len(hashes) and self._folder.has(Kind.PAGE, hashes[end]):
            end += 1
        if self._prefixes.block is None:
            return end, False
        step = self._prefixes.block // self._pool.page_size
        for last in range(end // step * step, 0, -step):
            if hashes[last - 1] in self._prefixes.saved:
                return last, False
            if self._folder.has(Kind.STATE, hashes[last - 1]):
                return last, True
        return 0, False

    def _load(self, load: Load) -> int:
        """Fill pages in order, up to the first that cannot be read; on the loader's thread."""
        most = max(1, BATCH_BYTES // self._content.page_bytes)
        buffer = memoryview(bytearray(min(most, len(load.pages)) * self._content.page_bytes))
        count = 0
        while count < len(load.pages):
            wanted = slice(count, count + most)
            num_read = self._load_some(load.pages[wanted], load.digests[wanted], buffer)
            count += num_read
            if num_read < len(load.pages[wanted]):
                break
        self._load_state(load, is_whole=count == len(load.pages))
        return count

    def _load_some(self, pages: list[int], digests: list[bytes], buffer: memoryview) -> int:
        """Fill as many of the pages as can be read, through `buffer`."""
        size, count = self._content.page_bytes, 0
        for digest in digests:
            if not self._folder.read(Kind.PAGE, digest, buffer[count * size : (count + 1) * size]):
                break
            count += 1
        if count:
            self._content.write_pages(pages[:count], buffer[: count * size])
        return count

    def _load_state(self, load: Load, is_whole: bool) -> None:
        """Fill the load's row, if it has one; the state of pages that are not all there is of no use."""
        if load.state is None:
            return
        digest, row = load.state
        content = memoryview(bytearray(self._content.state_bytes))
        if is_whole and self._folder.read(Kind.STATE, digest, content):
            self._content.write_state(row, content)
        else:
            load.state = b"", row

    def land(self, load: Load) -> None:
        """Make what a finished load has brought findable. The sequence then takes it as any cached prefix."""
        count = 0 if load.done.exception() is not None else load.done.result()
        for page, digest in zip(load.pages[:count], load.digests, strict=False):
            self._pool.register(page, digest)
        self._pool.free([*load.held, *load.pages])
        if load.state is not None:
            digest, row = load.state
            if digest and load.done.exception() is None:
                self._prefixes.saved.register(row, digest)
            else:
                self._prefixes.saved.give_back(row)
        num_loaded = count * self._pool.page_size
        load.seq.num_loaded = num_loaded
        self.totals.hit_tokens += num_loaded

    def close(self) -> None:
        """Write on for CLOSE_S seconds at most, then end the threads."""
        self._loader.shutdown(cancel_futures=True)
        timer = threading.Timer(CLOSE_S, self._hurry)
        timer.start()
        self._queue.put(None)
        self._writer.join()
        timer.cancel()

    def _hurry(self) -> None:
        self._is_closing = True
