"""Scrape: the text of /metrics, made on a thread, by one at a time: whoever asks meanwhile gets the same text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Scrape:
    """Rendering holds the interpreter for milliseconds; a crowd that asks must not add those up."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._next: asyncio.Task[bytes] | None = None

    async def text(self) -> bytes:
        """Rendered after the call, unless a rendering is under way."""
        if self._next is None or self._next.done():
            self._next = asyncio.create_task(asyncio.to_thread(self._render))
        return await asyncio.shield(self._next)
