"""Preparation: where a body is parsed, rendered and tokenised. Small ones at once, large ones on a few threads.

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
