"""Scrape: the text of /metrics, made on a thread, by one at a time: whoever asks meanwhile gets the same text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

REST = 9.0
"""Times as long as a rendering took before the next one begins: a crowd gets a tenth of one core at most."""
MOST_REST_S = 1.0


class Scrape:
    """Rendering holds the interpreter for milliseconds; a crowd that asks must not add those up."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._next: asyncio.Task[bytes] | None = None
        self._not_before_s = 0.0

    async def text(self) -> bytes:
        """Rendered after the call, unless a rendering is under way."""
        if self._next is None or self._next.done():
            self._next = asyncio.create_task(self._rendered())
        return await asyncio.shield(self._next)

    async def _rendered(self) -> bytes:
        await asyncio.sleep(self._not_before_s - time.monotonic())
        begun_s = time.monotonic()
        text = await asyncio.to_thread(self._render)
        ended_s = time.monotonic()
        self._not_before_s = ended_s + min(MOST_REST_S, REST * (ended_s - begun_s))
        return text
