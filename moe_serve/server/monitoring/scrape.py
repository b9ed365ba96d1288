"""Scrape: the text of /metrics, made on a thread, by one at a time: whoever asks meanwhile gets the same text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SHARE = 0.03
"""Of one core: what renderings may take in the long run. While one runs, each step of the engine waits for it."""
BURST_S = 0.1
"""CPU time that those who ask now and then may use at once."""
MOST_REST_S = 1.0


class Budget:
    """CPU time that comes in at a steady rate, up to a most."""

    def __init__(self) -> None:
        self._left_s = BURST_S
        self._counted_s: float | None = None

    def rest_s(self, now_s: float) -> float:
        """How long to wait before more is spent."""
        since_s = 0.0 if self._counted_s is None else now_s - self._counted_s
        self._counted_s = now_s
        self._left_s = min(BURST_S, self._left_s + SHARE * since_s)
        return min(MOST_REST_S, max(0.0, -self._left_s / SHARE))

    def spend(self, cpu_s: float) -> None:
        self._left_s -= cpu_s


class Scrape:
    """Rendering holds the interpreter for milliseconds; a crowd that asks must not add those up."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._next: asyncio.Task[bytes] | None = None
        self._budget = Budget()

    async def text(self) -> bytes:
        """Rendered after the call, unless a rendering is under way."""
        if self._next is None or self._next.done():
            self._next = asyncio.create_task(self._rendered())
        return await asyncio.shield(self._next)

    async def _rendered(self) -> bytes:
        await asyncio.sleep(self._budget.rest_s(time.monotonic()))
        return await asyncio.to_thread(self._render_counted)

    def _render_counted(self) -> bytes:
        begun_s = time.thread_time()
        text = self._render()
        self._budget.spend(time.thread_time() - begun_s)
        return text
