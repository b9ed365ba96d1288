"""KVCache: the tensors behind the page numbers, one key and one value tensor per decoder layer.

Knows shapes and copies; knows nothing of who owns a page (moe_serve/scheduling/kv_pages.py does).

Layout: [KV heads, P * B, head dim], heads outermost, so that the tokens of one head lie in one
contiguous run after a gather: SDPA on CPU is up to 2.4x slower on the token-major layout when
there is one query per KV head (docs/log/cpu-kernels.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class LayerKVShape:
    """What one layer caches per token."""

    num_heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False
    """A value is the beginning of its key: latents (hf/latent_attention.py)."""
    index_dim: int = 0
    """Of an indexer's keys, one per token (hf/sparse_attention.py); 0: the layer has no indexer."""

    @property
    def elements_per_token(self) -> int:
        return self.num_heads * (self.key_dim + (0 if self.values_in_keys else self.value_dim)) + self.index_dim


class Scratch:
    """Named buffers that grow and are reused, because fresh memory costs a page fault per 4 KiB.

    Without it, half the time of a gather went into faults (docs/log/engine.md).
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised contiguous tensor of `shape`; overwritten by the next call of this name."""
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = torch.empty(count, dtype=like.dtype, device=like.device)
        return buffer[:count].view(shape)


class LayerKV:
    """Keys and values of one layer: `keys` [heads, P*B, key_dim], `values` [heads, P*B, value_dim]."""

    def __init__(
        self,
        shape: LayerKVShape,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Scratch,
    ) -> None:
        tokens = num_pages * page_size
        self.shape = shape
        self.page_size = page_size
        self._scratch = scratch
        self.keys = lazy_zeros((shape.num_heads, tokens, shape.key_dim), dtype, device)
        if shape.values_in_keys:
            self.values = self.keys[..., : shape.value_dim]
        else:
            self.values = lazy_zeros((shape.num_heads, tokens, shape.value_dim), dtype, device)
        self.index_keys = lazy_zeros((tokens, shape.index_dim), dtype, device)

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """What takes memory: keys, and values unless they are in the keys."""
        return (self.keys,) if self.shape.values_in_keys else (self.keys, self.values)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of it, an indexer's keys included: [heads, P*B, dim] each."""
        return (*self.stored, self.index_keys[None])

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys, values [heads, T, dim] at `slots` [T]."""
        for data, rows in zip(self.stored, (keys, values), strict=False):
            data.index_copy_(1, slots, rows)

    def write_index(self, slots: torch.Tensor, keys: torch.Tensor) -> None:
        """Store an indexer's keys [T, index_dim] at `slots` [T]."""
        self.index_keys.index_copy_(0, slots, keys)

    def index_of(self, pages: torch.Tensor) -> torch.Tensor:
        """A copy of the indexer's keys in `pages` [p] -> [p*B, index_dim]."""
        return self.index_keys.view(-1, self.page_size, self.shape.index_dim)[pages].flatten(0, 1)

    def gather(self, page_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the pages in `page_table` [N, p] -> two tensors [N, heads, p*B, dim].

        They live in scratch memory and are valid until the next gather of any layer.
        """
        keys = self._gather("keys", self.keys, page_table)
        if self.shape.values_in_keys:
            return keys, keys[..., : self.shape.value_dim]
        return keys, self._gather("values", self.values, page_table)

    def _gather(self, name: str, data: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        heads, tokens, dim = data.shape
        by_page = data.view(heads, tokens // self.page_size, self.page_size * dim)
        picked = self._scratch.empty(name, (heads, page_table.numel(), self.page_size * dim), data)
        torch.index_select(by_page, 1, page_table.flatten(), out=picked)
        return picked.view(heads, page_table.shape[0], -1, dim).transpose(0, 1)

    def run(self, first_page: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [1, heads, length, dim] of consecutive pages; nothing is copied."""
        start = first_page * self.page_size
        return self.keys[None, :, start : start + length], self.values[None, :, start : start + length]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory on a CPU only where they are written.

    torch.zeros writes them all; NumPy asks the kernel for zero pages. A page pool is sized for the
    worst case, so the difference is gigabytes.
    """
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


class KVCache:
    """The LayerKV of every decoder layer, by layer index."""

    def __init__(
        self,
        shapes: dict[int, LayerKVShape],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        scratch = Scratch()
        self.layers = {i: LayerKV(s, num_pages, page_size, dtype, device, scratch) for i, s in shapes.items()}
        self.num_bytes = num_pages * page_size * bytes_per_token(shapes, dtype)
        """What the pages take once all have been written."""


def bytes_per_token(shapes: dict[int, LayerKVShape], dtype: torch.dtype) -> int:
    """KV bytes one token takes over all layers."""
    return sum(s.elements_per_token for s in shapes.values()) * dtype.itemsize
