"""Paged attention for decoding on the CPU, float32, keys and values read in place.

    out[n, h*G + g] = softmax(scale * query[n, h*G + g] . keys[h, context of n]) @ values[h, context of n]

where the context of sequence n is the last `window` of its `lengths[n]` tokens, found through its
row of the page table, and a head's sink adds one logit without a value. (PagedAttention, vLLM;
sinks: GPT-OSS.)

Shape alphabet: N sequences, Hk key/value heads, G query heads per key/value head, D head dim,
P pages, B page size.
"""

from __future__ import annotations

import torch

from moe_serve_kernels.cpu import library


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when `paged_decode` can run on such tensors here."""
    return device.type == "cpu" and dtype == torch.float32 and library.load() is not None


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token per sequence -> [N, Hk*G, Dv] float32.

    query [N, Hk*G, D]; keys [Hk, P*B, D]; values [Hk, P*B, Dv]; page_table [N, max pages] int64;
    lengths [N] int64, each >= 1; sinks [Hk*G]. All contiguous, float32 where not stated, on CPU. `values` may also be
    the beginnings of the keys: latents (DeepSeek-V2).
    """
    tensors = (query, keys, values, page_table, lengths)
    assert all(t.is_contiguous() for t in (query, keys, page_table, lengths)), "paged_decode needs contiguous tensors"
    value_stride = values.stride(1)
    assert values.stride() == (values.shape[1] * value_stride, value_stride, 1)
    assert page_table.dtype == lengths.dtype == torch.int64
    assert query.dtype == keys.dtype == values.dtype == torch.float32
    num_seqs, heads, key_dim = query.shape
    kv_heads, tokens, value_dim = values.shape
    sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    out = query.new_empty(num_seqs, heads, value_dim)
    library.native().moe_serve_paged_decode_f32(
        *(t.data_ptr() for t in tensors),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        num_seqs,
        kv_heads,
        heads // kv_heads,
        key_dim,
        value_dim,
        value_stride,
        tokens,
        page_size,
        page_table.shape[1],
        scale,
        window or 0,
        torch.get_num_threads(),
    )
    return out
