"""PageBytes: where the bytes of a page, or of a saved state, lie in the tensors of all layers.

Knows tensors and layouts; knows no files and not who owns a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moe_serve.execution.kv_cache import KVCache
from moe_serve.execution.state_cache import StateCache


class PageBytes:
    """Reads and writes whole pages and states, on any thread."""

    def __init__(self, kv_cache: KVCache, states: StateCache, page_size: int) -> None:
        layers = kv_cache.layers.values()
        self._pages = [_by_page(tensor, page_size) for layer in layers for tensor in layer.tensors if tensor.numel()]
        self._states = [rows for layer in states.layers for rows in states.saved_rows(layer)]
        self.page_bytes = _num_bytes(self._pages)
        self.state_bytes = _num_bytes(self._states)

    def read_page(self, page: int) -> memoryview:
        """A copy."""
        return _read(self._pages, page)

    def write_pages(self, pages: Sequence[int], content: memoryview) -> None:
        """`content`: of the first page as read_page gave it, then of the next. In memory that can be written."""
        _write(self._pages, pages, content)

    def read_state(self, row: int) -> memoryview:
        """A copy."""
        return _read(self._states, row)

    def write_state(self, row: int, content: memoryview) -> None:
        """`content` as read_state gave it."""
        _write(self._states, [row], content)


def _by_page(tensor: torch.Tensor, page_size: int) -> torch.Tensor:
    """A view [P, heads, B, dim] of `tensor` [heads, P * B, dim]."""
    heads, tokens, dim = tensor.shape
    return tensor.view(heads, tokens // page_size, page_size, dim).transpose(0, 1)


def _num_bytes(parts: list[torch.Tensor]) -> int:
    """Of one page or row."""
    return sum(math.prod(part.shape[1:]) * part.element_size() for part in parts)


def _read(parts: list[torch.Tensor], number: int) -> memoryview:
    found = [part[number].contiguous().flatten().view(torch.uint8) for part in parts]
    content: Any = torch.cat(found).cpu().numpy() if found else b""
    return memoryview(content)


@torch.inference_mode()
def _write(parts: list[torch.Tensor], numbers: Sequence[int], content: memoryview) -> None:
    """One copy for each tensor and each run of `numbers` that follow each other."""
    rows = torch.frombuffer(content, dtype=torch.uint8).view(len(numbers), -1)
    for first, last in _runs(numbers):
        start = 0
        for part in parts:
            target = part[numbers[first] : numbers[last] + 1]
            end = start + _num_bytes([part])
            target.copy_(rows[first : last + 1, start:end].view(part.dtype).view(target.shape))
            start = end
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Positions of the first and the last of each run of numbers that follow each other."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield first, place - 1
            first = place
