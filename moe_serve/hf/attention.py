"""Paged attention behind Hugging Face's AttentionInterface.

transformers passes any keyword given to `model(...)` on to the attention function, so the whole
step travels as `forward_batch` and `kv_cache`, without a global. The function writes the step's
keys and values into their pages and attends, per decode group and per prefill run, to what the
pages hold (PagedAttention, vLLM). Knows nothing of scheduling or of who owns which page.

Shape alphabet: T tokens in the step, N sequences, Hq query heads, Hk key/value heads, G = Hq / Hk,
D head dim, C context length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from moe_serve.execution.forward_batch import DecodeGroup, ForwardBatch, PrefillRun
from moe_serve.execution.kv_cache import KVCache, LayerKV, LayerKVShape
from moe_serve_kernels import gpu
from moe_serve_kernels.cpu import paged_attention as native

NAME = "moe_serve_paged"


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Paged attention makes its own masks from page tables."""


def in_place_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """What attends to pages where they lie, for decoding; None: they have to be gathered."""
    if native.is_available(device, dtype):
        return native.paged_decode
    if gpu.is_available(device):
        from moe_serve_kernels.gpu import paged_attention as triton_attention  # machines without a GPU may lack triton

        if triton_attention.is_available(device, dtype):
            return triton_attention.paged_decode
    return None


class KVShapeProbe:
    """Stands in for the KV cache in one forward pass, to learn what each layer would cache.

    Asking the model beats reading config fields: every family names and derives them differently.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, LayerKVShape] = {}

    def observe(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.shapes[layer_idx] = LayerKVShape(key.shape[1], key.shape[3], value.shape[3])


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forward_batch: ForwardBatch,
    kv_cache: KVCache | KVShapeProbe,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over the step's flattened tokens.

    query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, Dv] -> ([1, T, Hq, Dv], None).
    `s_aux` [Hq]: attention sink logits (GPT-OSS). `sliding_window`: tokens seen, self included.
    """
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(kv_cache, KVShapeProbe):
        kv_cache.observe(layer_idx, key, value)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    layer = kv_cache.layers[layer_idx]
    layer.write(forward_batch.kv_slots, key[0], value[0])
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    # Some families pass their window, some only keep it, some leave it to the mask (hf/loading.py).
    window = sliding_window or getattr(module, "sliding_window", None)
    attend = _Attend(scaling, window, s_aux)
    for group in forward_batch.decode_groups:
        rows = slice(group.first_row, group.first_row + group.num_seqs)
        out[rows] = attend.decode(query[0, :, rows], layer, group)
    for run in forward_batch.prefill_runs:
        rows = slice(run.first_row, run.first_row + run.count)
        out[rows] = attend.prefill(query[0, :, rows], layer, run)
    return out[None], None


class _Attend:
    """One layer's attention arithmetic: scale, window and sinks are fixed, groups and runs vary."""

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
        """query [Hq, count, D] -> [count, Hq, Dv], causal over a context of run.end tokens."""
        keys, values = layer.gather(run.pages[None])
        keys, values = keys[:, :, : run.end], values[:, :, : run.end]
        group = query.shape[0] // keys.shape[1]
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        if run.start == 0 and self.sinks is None and (self.window is None or run.end <= self.window):
            out = sdpa(query[None], keys, values, is_causal=True, scale=self.scaling)
        else:
            mask = _prefill_mask(run, self.window, query.dtype)
            out = self._attention(query[None], keys, values, mask)
        return out[0].transpose(0, 1)

    def _attention(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.sinks is None:
            return sdpa(query, keys, values, attn_mask=mask, scale=self.scaling)
        return _attention_with_sinks(query, keys, values, mask, self._scale(query), self.sinks)


def _attention_with_sinks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Softmax with one extra logit per head that takes weight but has no value (GPT-OSS).

    query [N, h, R, D], keys [N, h, C, D]; `sinks` [Hq] is laid out head-major over (h, R) for
    decode (R = G) and over h alone for prefill (h = Hq).
    """
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    per_row = sinks.view(1, scores.shape[1], -1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
    weights = torch.cat([scores, per_row], dim=-1).float().softmax(dim=-1)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)


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
        group.masks[window] = _additive(hidden, dtype)[:, None, None]
    return group.masks[window]


def _prefill_mask(run: PrefillRun, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask [count, C] for queries at positions start .. end-1."""
    if window not in run.masks:
        key_pos = torch.arange(run.end, device=run.pages.device)[None]
        query_pos = torch.arange(run.start, run.end, device=run.pages.device)[:, None]
        hidden = key_pos > query_pos
        if window is not None:
            hidden |= key_pos <= query_pos - window
        run.masks[window] = _additive(hidden, dtype)
    return run.masks[window]


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
