"""KVCache: the tensors behind the page numbers, one key and one value tensor per decoder layer.

Knows shapes and copies; knows nothing of who owns a page (moe_serve/kv_pages.py does).

Layout: [KV heads, P * B, head dim], heads outermost, so that the tokens of one head lie in one
contiguous run after a gather: SDPA on CPU is up to 2.4x slower on the token-major layout when
there is one query per KV head (docs/log.md, 2026-11-21).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerKVShape:
    """What one layer caches per token. Key and value widths differ in multi-head latent attention."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.num_heads * (self.key_dim + self.value_dim)


class LayerKV:
    """Keys and values of one layer: `keys` [heads, P*B, key_dim], `values` [heads, P*B, value_dim]."""

    def __init__(self, shape: LayerKVShape, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        tokens = num_pages * page_size
        self.page_size = page_size
        self.keys = torch.zeros(shape.num_heads, tokens, shape.key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(shape.num_heads, tokens, shape.value_dim, dtype=dtype, device=device)

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys, values [heads, T, dim] at `slots` [T]."""
        self.keys.index_copy_(1, slots, keys)
        self.values.index_copy_(1, slots, values)

    def gather(self, page_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the pages in `page_table` [N, p] -> two tensors [N, heads, p*B, dim]."""
        return self._gather(self.keys, page_table), self._gather(self.values, page_table)

    def _gather(self, data: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        heads, tokens, dim = data.shape
        by_page = data.view(heads, tokens // self.page_size, self.page_size * dim)
        picked = by_page.index_select(1, page_table.flatten())
        return picked.view(heads, page_table.shape[0], -1, dim).transpose(0, 1)

    def run(self, first_page: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [1, heads, length, dim] of consecutive pages; nothing is copied."""
        start = first_page * self.page_size
        return self.keys[None, :, start : start + length], self.values[None, :, start : start + length]


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
        self.layers = {i: LayerKV(s, num_pages, page_size, dtype, device) for i, s in shapes.items()}


def bytes_per_token(shapes: dict[int, LayerKVShape], dtype: torch.dtype) -> int:
    """KV bytes one token takes over all layers."""
    return sum(s.elements_per_token for s in shapes.values()) * dtype.itemsize
