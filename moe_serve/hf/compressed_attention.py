"""Compressed attention (DeepSeek-V4): a query sees the last tokens as they are, and older ones in windows that were
each pooled to one entry; an indexer may choose among the entries.

transformers' own modules pool, index and attend, one sequence at a time. What their cache would keep between calls is
derived here from rows that lie in the sequence's pages, one per token: its key, what the pooling of its window needs,
and in the row of a window's last token the window's entry. So prefix hits, chunks and preemption need nothing more.

Knows transformers' modules and pages; knows no batches' order and no scheduling.
Shape alphabet: T tokens in the step, n of a piece, C of a context, D of a head, W of a row, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_serve.execution.forward_batch import ForwardBatch
from moe_serve.execution.kv_cache import LayerKV, LayerKVShape
from moe_serve.hf.attend import additive

PIECE = 128
"""Tokens of a prompt that are attended to at a time: the modules make scores for all of them and all heads. On a CPU it
is one, so that a token's sums have the same length in any chunk."""
POOLING = "compressor"
INDEXING = "indexer"
"""transformers' names for the two kinds of pooling."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Where one kind of pooling has its numbers in a token's row."""

    rate: int
    """Tokens of a window."""
    values: slice
    gates: slice
    entry: slice
    gate_bias: torch.Tensor
    """[rate, gates' width]: added to the gates of a window's tokens."""


class Row:
    """What a token's row of one layer holds: D of its key, then what its pools need."""

    def __init__(self, attention: Any) -> None:
        self.layer_idx = int(attention.layer_idx)
        self.window = int(attention.sliding_window)
        self.width = self.key_dim = int(attention.head_dim)
        self.pools: dict[str, Pool] = {}
        pooling = attention.compressor
        if pooling is not None:
            self._add(POOLING, pooling, pooling.compress_rate)
            if hasattr(pooling, "indexer"):
                self._add(INDEXING, pooling.indexer, pooling.compress_rate)

    def _add(self, name: str, module: Any, rate: int) -> None:
        width, bias = module.kv_proj.out_features, module.position_bias
        self.pools[name] = Pool(rate, self._take(width), self._take(width), self._take(module.head_dim), bias)

    def _take(self, width: int) -> slice:
        start, self.width = self.width, self.width + width
        return slice(start, self.width)

    @property
    def shape(self) -> LayerKVShape:
        return LayerKVShape(1, self.width, self.key_dim, values_in_keys=True)


class SequenceRows:
    """What transformers' attention asks of a cache: one sequence's, n tokens of which are computed now.

    Shapes are transformers': [1, 1, n, D] of keys, [1, n, width] of the numbers to be pooled.
    """

    def __init__(self, row: Row, layer: LayerKV, pages: torch.Tensor, start: int, end: int) -> None:
        """`pages` [p]: of the context, which has `end` tokens; those from `start` on are computed now."""
        self._layer_idx = row.layer_idx
        self._row, self._rows, self._pages, self._page_size = row, layer.keys[0], pages, layer.page_size
        self._start, self._end = start, end
        self.first_seen = max(0, start - row.window + 1)

    @property
    def layers(self) -> dict[int, SequenceRows]:
        """As of a cache of all layers, this one under its index."""
        return {self._layer_idx: self}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """keys [1, 1, n, D], which are the values -> those that the window reaches [1, 1, n', D], twice."""
        columns = slice(0, self._row.key_dim)
        self._write(self._start, keys[0, 0], columns)
        seen = self._read(torch.arange(self.first_seen, self._end), columns, keys.dtype)[None]
        return seen, seen

    def store_compression_weights(
        self, name: str, values: torch.Tensor, gates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Keep what n tokens add -> the same of all whole windows that end now, and the first one's position."""
        pool = self._row.pools[name]
        self._write(self._start, values[0], pool.values)
        self._write(self._start, gates[0], pool.gates)
        first, last = self._start // pool.rate * pool.rate, self._end // pool.rate * pool.rate
        ended = torch.arange(first, max(first, last))
        return self._read(ended, pool.values, values.dtype), self._read(ended, pool.gates, gates.dtype), first

    def update_overlap_state(
        self, name: str, values: torch.Tensor, gates: torch.Tensor, head_dim: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The window before those that end now, as far as it adds to the next [1, rate, head_dim]; None: none."""
        pool = self._row.pools[name]
        first = self._start // pool.rate * pool.rate
        if first == 0:
            return None, None
        before = torch.arange(first - pool.rate, first)
        found = self._read(before, pool.gates, values.dtype) + pool.gate_bias
        return self._read(before, pool.values, values.dtype)[..., :head_dim], found[..., :head_dim]

    def update_compressor_states(self, name: str, entries: torch.Tensor) -> torch.Tensor:
        """Keep the entries [1, windows, D] of the windows that end now -> those of all that have ended."""
        pool = self._row.pools[name]
        ends = torch.arange(self._end // pool.rate) * pool.rate + pool.rate - 1
        self._rows[self._slots(ends[len(ends) - entries.shape[1] :]), pool.entry] = entries[0].to(self._rows.dtype)
        return self._read(ends, pool.entry, entries.dtype)

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        positions = positions.to(self._pages.device)
        return self._pages[positions // self._page_size] * self._page_size + positions % self._page_size

    def _read(self, positions: torch.Tensor, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        """[1, len(positions), width]."""
        return self._rows[:, columns][self._slots(positions)].to(dtype)[None]

    def _write(self, start: int, numbers: torch.Tensor, columns: slice) -> None:
        slots = self._slots(torch.arange(start, start + len(numbers)))
        self._rows[slots, columns] = numbers.to(self._rows.dtype)


class CompressedAttention:
    """Stands in the place of one attention module's forward."""

    def __init__(self, attention: Any) -> None:
        self._forward: Callable[..., tuple[torch.Tensor, Any]] = attention.forward
        self._row = Row(attention)
        self._turns: str = attention.rope_layer_type
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = "eager"

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        position_ids: torch.Tensor,
        forward_batch: ForwardBatch | None,
        kv_cache: Any,
        **unread: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, T, H] -> [1, T, H]."""
        out = torch.empty_like(hidden_states)
        if forward_batch is None:
            kv_cache.shapes[self._row.layer_idx] = self._row.shape
            return out.zero_(), None
        cos, sin = position_embeddings[self._turns]
        layer = kv_cache.layers[self._row.layer_idx]
        piece = 1 if hidden_states.device.type == "cpu" else PIECE
        for rows, pages, start in _pieces(forward_batch, piece):
            end = start + rows.stop - rows.start
            turns = {self._turns: (cos[:, rows], sin[:, rows])}
            held = SequenceRows(self._row, layer, pages, start, end)
            mask = self._mask(held.first_seen, start, end, hidden_states)
            out[:, rows], _ = self._forward(hidden_states[:, rows], turns, position_ids[:, rows], mask, held)
        return out, None

    def _mask(self, first: int, start: int, end: int, like: torch.Tensor) -> torch.Tensor:
        """Additive mask [1, 1, n, end - first]: each query sees itself and the window before it."""
        keys = torch.arange(first, end, device=like.device)
        distance = torch.arange(start, end, device=like.device)[:, None] - keys
        return additive((distance < 0) | (distance >= self._row.window), like.dtype)[None, None]


def _pieces(batch: ForwardBatch, piece: int) -> Iterator[tuple[slice, torch.Tensor, int]]:
    """(rows of the step, pages of the context, position of the first row) of one sequence at a time; prompts are cut
    where their positions are whole multiples of `piece`."""
    for group in batch.decode_groups:
        for one in group.singly():
            yield slice(one.first_row, one.first_row + 1), one.page_table[0], one.max_length - 1
    for run in batch.prefill_runs:
        start = run.start
        while start < run.end:
            end = min(run.end, (start // piece + 1) * piece)
            row = run.first_row + start - run.start
            yield slice(row, row + end - start), run.pages, start
            start = end


def install(model: nn.Module, config: Any) -> None:
    """Have every compressed attention of `model` read and write pages; `config` is the family hook's and not needed."""
    for module in model.modules():
        if hasattr(module, "compressor") and hasattr(module, "rope_layer_type"):
            attention: Any = module
            attention.forward = CompressedAttention(attention).forward
