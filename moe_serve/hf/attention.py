"""Paged attention behind Hugging Face's AttentionInterface.

transformers passes any keyword given to `model(...)` on to the attention function, so the whole
step travels as `forward_batch` and `kv_cache`, without a global. The function writes the step's
keys and values into their pages and attends, per decode group and per prefill run, to what the
pages hold (PagedAttention, vLLM). Knows nothing of scheduling or of who owns which page.

Shape alphabet: T tokens in the step, N sequences, Hq query heads, Hk key/value heads, G = Hq / Hk,
D head dim, C context length.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from moe_serve.execution.forward_batch import ForwardBatch
from moe_serve.execution.kv_cache import KVCache, LayerKV, LayerKVShape
from moe_serve.hf.attend import Attend
from moe_serve.hf.chunked_attention import AttendToChunk
from moe_serve.hf.latent_attention import AttendToLatents
from moe_serve.hf.plain_torch import plain_torch
from moe_serve.hf.sparse_attention import AttendToChosen, Choice

NAME = "moe_serve_paged"
NOT_PASSED: Any = object()
"""Of an argument that a family does not give; None would be a value."""


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Paged attention makes its own masks from page tables."""


class KVShapeProbe:
    """Stands in for the KV cache in one forward pass, to learn what each layer would cache.

    Asking the model beats reading config fields: every family names and derives them differently.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, LayerKVShape] = {}

    def observe(self, module: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        indexer = getattr(module, "indexer", None)
        self.shapes[int(module.layer_idx)] = LayerKVShape(
            key.shape[1],
            key.shape[3],
            value.shape[3],
            values_in_keys=hasattr(module, "latent_projections"),
            index_dim=0 if indexer is None else indexer.head_dim,
        )


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
    sliding_window: int | None = NOT_PASSED,
    s_aux: torch.Tensor | None = None,
    indices: Choice | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over the step's flattened tokens.

    query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, Dv] -> ([1, T, Hq, Dv], None). Of a module that has
    `latent_projections`, key and value are rows of latents and their beginnings (latent_attention.py).
    `s_aux` [Hq]: attention sink logits (GPT-OSS). `sliding_window`: tokens seen, self included. `indices`: what an
    indexer was asked (sparse_attention.py).
    """
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    latents: Any = getattr(module, "latent_projections", None)
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3] if latents is None else latents.value_dim)
    if isinstance(kv_cache, KVShapeProbe):
        kv_cache.observe(module, key, value)
        return out.zero_()[None], None
    layer = kv_cache.layers[layer_idx]
    if (scales := getattr(module, "query_scales", None)) is not None:
        query = (query * scales(forward_batch.positions)).to(query.dtype)
    # Some families pass their window, None included; some only keep it; some leave it to the mask (hf/loading.py).
    kept: Any = getattr(module, "sliding_window", None)
    window = kept if sliding_window is NOT_PASSED else sliding_window
    chunk: Any = getattr(module, "attention_chunk", None)
    plain = Attend(scaling, window, s_aux) if chunk is None else AttendToChunk(scaling, chunk, s_aux)
    attend: Attend | AttendToLatents | AttendToChosen = plain
    if latents is not None and indices is None:
        attend = AttendToLatents(plain, latents)
    elif latents is not None and indices is not None:
        attend = AttendToChosen(plain, latents, indices, forward_batch.kv_slots)
    with plain_torch() if indices is None else nullcontext():  # an indexer's scores need the fixed order
        layer.write(forward_batch.kv_slots, key[0], value[0])
        _attend_by_sequence(attend, query[0], layer, forward_batch, out)
    return out[None], None


def _attend_by_sequence(
    attend: Attend | AttendToLatents | AttendToChosen,
    query: torch.Tensor,
    layer: LayerKV,
    batch: ForwardBatch,
    out: torch.Tensor,
) -> None:
    """query [Hq, T, D] -> out [T, Hq, Dv]."""
    for group in batch.decode_groups:
        rows = slice(group.first_row, group.first_row + group.num_seqs)
        out[rows] = attend.decode(query[:, rows], layer, group)
    for run in batch.prefill_runs:
        rows = slice(run.first_row, run.first_row + run.count)
        out[rows] = attend.prefill(query[:, rows], layer, run)
