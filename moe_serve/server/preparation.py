"""Preparation: where bodies become requests and outputs answers. Small ones at once, large ones on a few threads.

The event loop answers probes and streams to everyone; it does nothing whose cost grows with one client's bytes.
Knows threads; knows no bodies.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from moe_serve.errors import OverloadedError

T = TypeVar("T")

INLINE_BYTES = 4096
"""Below this, work takes less than a millisecond, and a thread would cost more than it saves."""
INLINE_SCORES = 1000
"""Log-probabilities of an answer, alternatives included: below this it is shaped in 2 ms."""
NUM_THREADS = 2
MAX_LARGE_BODIES = 64
"""In work and waiting."""


class Preparation:
    """A bounded line of large bodies before a few threads."""

    def __init__(self, num_threads: int = NUM_THREADS, max_bodies: int = MAX_LARGE_BODIES) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "moe-serve-prepare")
        self._places = threading.BoundedSemaphore(max_bodies)

    async def run(self, num_bytes: int, work: Callable[[], T]) -> T:
        """What `work` returns or raises; its cost grows with `num_bytes`. OverloadedError: the line is full."""
        if num_bytes <= INLINE_BYTES:
            return work()
        if not self._places.acquire(blocking=False):
            raise OverloadedError("too many large requests are being read; try again", 1)
        future = self._threads.submit(work)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    async def shape(self, num_scores: int, work: Callable[[], T]) -> T:
        """The same for an answer with `num_scores` log-probabilities. None is refused: each has been computed."""
        if num_scores <= INLINE_SCORES:
            return work()
        return await asyncio.wrap_future(self._threads.submit(work))
