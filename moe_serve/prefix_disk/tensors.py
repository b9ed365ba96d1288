"""PageBytes: where the bytes of a page, or of a saved state, lie in the tensors of all layers.

Knows tensors and layouts; knows no files and not who owns a page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moe_serve.execution.kv_cache import KVCache
from moe_serve.execution.state_cache import StateCache

Place = Callable[[int], torch.Tensor]
"""Number of a page or row -> a view of one tensor's part of it."""


class PageBytes:
    """Reads and writes whole pages and states, on any thread."""

    def __init__(self, kv_cache: KVCache, states: StateCache, page_size: int) -> None:
        self._page = [place for layer in kv_cache.layers.values() for place in _places(layer.tensors, page_size)]
        self._state: list[Place] = [row for layer in states.layers for row in states.saved_rows(layer)]
        self.page_bytes = _num_bytes(self._page)
        self.state_bytes = _num_bytes(self._state)

    def read_page(self, page: int) -> memoryview:
        """A copy."""
        return _read(self._page, page)

    def write_page(self, page: int, content: memoryview) -> None:
        """`content` as read_page gave it, in memory that can be written."""
        _write(self._page, page, content)

    def read_state(self, row: int) -> memoryview:
        """A copy."""
        return _read(self._state, row)

    def write_state(self, row: int, content: memoryview) -> None:
        """`content` as read_state gave it."""
        _write(self._state, row, content)


def _places(tensors: tuple[torch.Tensor, ...], page_size: int) -> list[Place]:
    """`tensors`: [heads, P * B, dim] each."""
    views = [t.view(t.shape[0], t.shape[1] // page_size, page_size, t.shape[2]) for t in tensors if t.numel()]
    return [partial(_page_of, view) for view in views]


def _page_of(view: torch.Tensor, page: int) -> torch.Tensor:
    return view[:, page]


def _num_bytes(places: list[Place]) -> int:
    return sum(part.numel() * part.element_size() for part in (place(0) for place in places))


def _read(places: list[Place], number: int) -> memoryview:
    parts = [place(number).contiguous().flatten().view(torch.uint8) for place in places]
    content: Any = torch.cat(parts).cpu().numpy() if parts else b""
    return memoryview(content)


@torch.inference_mode()
def _write(places: list[Place], number: int, content: memoryview) -> None:
    flat, start = torch.frombuffer(content, dtype=torch.uint8), 0
    for place in places:
        part = place(number)
        size = part.numel() * part.element_size()
        part.copy_(flat[start : start + size].view(part.dtype).view(part.shape))
        start += size
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
