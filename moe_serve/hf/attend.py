"""Attend: one layer's attention over what its pages hold, for decoding sequences and for parts of prompts.

Takes queries and a layer's cache; knows no model. (PagedAttention, vLLM.)

Shape alphabet: N sequences, Hq query heads, Hk key/value heads, G = Hq / Hk, D head dim, C context length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from moe_serve.execution.forward_batch import DecodeGroup, PrefillRun
from moe_serve.execution.kv_cache import LayerKV
from moe_serve.hf import sink_attention
from moe_serve_kernels import gpu
from moe_serve_kernels.cpu import paged_attention as native


def in_place_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """What attends to pages where they lie, for decoding; None: they have to be gathered."""
    if native.is_available(device, dtype):
        return native.paged_attention
    if gpu.is_available(device):
        from moe_serve_kernels.gpu import paged_attention as triton_attention  # machines without a GPU may lack triton

        if triton_attention.is_available(device, dtype):
            return triton_attention.paged_decode
    return None


class Attend:
    """Scale, window and sinks are fixed, groups and runs vary."""

    def __init__(self, scaling: float | None, window: int | None, sinks: torch.Tensor | None) -> None:
        self.scaling = scaling
        self.window = window
        self.sinks = sinks

    def decode(self, query: torch.Tensor, layer: LayerKV, group: DecodeGroup) -> torch.Tensor:
        """query [Hq, N, D] -> [N, Hq, Dv]."""
        kernel = in_place_kernel(layer.keys.device, layer.keys.dtype)
        if kernel is not None:
            return self._decode_in_place(kernel, query, layer, group)
        return self._decode_gathered(query, layer, group)

    def _decode_in_place(
        self, kernel: Callable[..., torch.Tensor], query: torch.Tensor, layer: LayerKV, group: DecodeGroup
    ) -> torch.Tensor:
        return kernel(
            query.transpose(0, 1).contiguous(),
            layer.keys,
            layer.values,
            group.page_table,
            group.lengths,
            page_size=layer.page_size,
            scale=self._scale(query),
            window=self.window,
            sinks=self.sinks,
        )

    def _scale(self, query: torch.Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scaling is None else float(self.scaling)

    def _decode_gathered(self, query: torch.Tensor, layer: LayerKV, group: DecodeGroup) -> torch.Tensor:
        """The G query heads of a KV head ride as G query rows, so that keys are not repeated."""
        if group.single_run is not None:
            keys, values = layer.run(group.single_run, group.max_length)
        else:
            keys, values = layer.gather(group.page_table)
            keys, values = keys[:, :, : group.max_length], values[:, :, : group.max_length]
        heads = keys.shape[1]
        num_queries, num_seqs, dim = query.shape
        packed = query.transpose(0, 1).reshape(num_seqs, heads, num_queries // heads, dim)
        out = self._attention(packed, keys, values, _decode_mask(group, self.window, query.dtype))
        return out.reshape(num_seqs, num_queries, -1)

    def prefill(self, query: torch.Tensor, layer: LayerKV, run: PrefillRun) -> torch.Tensor:
        """query [Hq, count, D] -> [count, Hq, Dv], causal over a context of run.end tokens. One token is computed as in
        decoding, where it has come from."""
        if run.count == 1:
            return self.decode(query, layer, run.as_group())
        if native.is_available(layer.keys.device, layer.keys.dtype):
            return self._prefill_in_place(query, layer, run)
        keys, values = layer.gather(run.pages[None])
        keys, values = keys[0, :, : run.end], values[0, :, : run.end]
        group = len(query) // len(keys)
        if group > 1:
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        return self.attend_to_context(query, keys, values, run)

    def _prefill_in_place(self, query: torch.Tensor, layer: LayerKV, run: PrefillRun) -> torch.Tensor:
        """With the bits that decoding gives each token."""
        pieces = self._pieces(run)
        return native.paged_attention(
            query.transpose(0, 1),
            layer.keys,
            layer.values,
            run.pages.expand(len(pieces), -1).contiguous(),
            torch.tensor([start + 1 for start, _ in pieces]),
            page_size=layer.page_size,
            scale=self._scale(query),
            window=self.window,
            sinks=self.sinks,
            starts=torch.tensor([*(start - run.start for start, _ in pieces), run.count]),
            firsts=torch.tensor([first for _, first in pieces]),
        )

    def _pieces(self, run: PrefillRun) -> list[tuple[int, int]]:
        """Parts of a run: where each begins, and where the context that its tokens see does."""
        return [(run.start, 0)]

    def attend_to_context(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: PrefillRun
    ) -> torch.Tensor:
        """As `prefill`, with keys [Hq, run.end, D] and values [Hq, run.end, Dv] of all heads."""
        if run.start == 0 and self.sinks is None and (self.window is None or run.end <= self.window):
            out = sdpa(query[None], keys[None], values[None], is_causal=True, scale=self.scaling)
        else:
            mask = _prefill_mask(run, self.window, query.dtype)
            seen = slice(self._first_seen(run, query.device), None)
            out = self._attention(query[None], keys[None, :, seen], values[None, :, seen], mask[:, seen])
        return out[0].transpose(0, 1)

    def _first_seen(self, run: PrefillRun, device: torch.device) -> int:
        """Keys before it are hidden from every query. With sinks on a GPU alone: elsewhere sums keep their order."""
        if self.sinks is None or self.window is None or device.type == "cpu":
            return 0
        return max(0, run.start - self.window + 1)

    def _attention(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.sinks is None:
            return sdpa(query, keys, values, attn_mask=mask, scale=self.scaling)
        attention = sink_attention.by_scores if query.device.type == "cpu" else sink_attention.by_key
        return attention(query, keys, values, mask, self._scale(query), self.sinks)


def _decode_mask(group: DecodeGroup, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Additive [N, 1, 1, C] mask, or None when every key is visible to every query."""
    if window is not None and group.max_length <= window:
        window = None
    if group.even and window is None:
        return None
    if window not in group.masks:
        key_pos = torch.arange(group.max_length, device=group.lengths.device)[None]
        hidden = key_pos >= group.lengths[:, None]
        if window is not None:
            hidden |= key_pos < group.lengths[:, None] - window
        group.masks[window] = additive(hidden, dtype)[:, None, None]
    return group.masks[window]


def _prefill_mask(run: PrefillRun, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask [count, C] for queries at positions start .. end-1."""
    if window not in run.masks:
        key_pos = torch.arange(run.end, device=run.pages.device)[None]
        query_pos = torch.arange(run.start, run.end, device=run.pages.device)[:, None]
        hidden = key_pos > query_pos
        if window is not None:
            hidden |= key_pos <= query_pos - window
        run.masks[window] = additive(hidden, dtype)
    return run.masks[window]


def additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that keeps `hidden` keys from being seen."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
