"""Gives memory back to the system after large bodies: the C library keeps what was freed in case it is wanted again."""

from __future__ import annotations

import asyncio
import ctypes

LARGE_BYTES = 1 << 20
DELAY_S = 0.5
"""After the answer: until then parts of the request are still referred to. Many requests share one turn."""


class MemoryReturn:
    """Hands free memory back a moment after the last large request, on a thread."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def note(self, num_bytes: int) -> None:
        """A request of this size is over; on the event loop."""
        if num_bytes < LARGE_BYTES or self._trim is None:
            return
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(DELAY_S, loop.run_in_executor, None, self._trim, 0)
