"""Paged attention on the CPU, keys and values read in place: of decoding sequences, and of parts of prompts.

    out[t, h*G + g] = softmax(scale * query[t, h*G + g] . keys[h, context of t]) @ values[h, context of t]

where the context of a token is the last `window` of the tokens of its sequence up to itself, found through the
sequence's row of the page table, and a head's sink adds one logit without a value. What a token gets does not depend on
the others of the call. (PagedAttention, vLLM; sinks: GPT-OSS.)

Shape alphabet: T tokens, N sequences, Hk key/value heads, G query heads per key/value head, D head dim, P pages, B page
size.
"""

from __future__ import annotations

import torch

from moe_serve_kernels.cpu import library


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when keys and values of `dtype` can be read here."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and library.load() is not None


def paged_attention(
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
    starts: torch.Tensor | None = None,
    firsts: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [T, Hk*G, D] -> [T, Hk*G, Dv] of its dtype, computed in float32.

    keys [Hk, P*B, D] and values [Hk, P*B, Dv]: both float32 or both bf16. page_table [N, max pages] int64. `starts`
    [N + 1] int64: where each sequence's tokens begin, and T; None: each has one. lengths [N] int64, each >= 1: what the
    first of these tokens sees, itself included; the next one sees one more. `firsts` [N] int64: contexts begin there.
    sinks [Hk*G]. All contiguous, on CPU. `values` may also be the beginnings of the keys: latents (DeepSeek-V2).
    """
    tables = [page_table, lengths, *(t for t in (starts, firsts) if t is not None)]
    assert all(table.is_contiguous() and table.dtype == torch.int64 for table in tables)
    assert keys.is_contiguous()
    value_stride = values.stride(1)
    assert values.stride() == (values.shape[1] * value_stride, value_stride, 1)
    assert keys.dtype == values.dtype
    wide = query.float().contiguous()
    heads, key_dim = wide.shape[1:]
    kv_heads, tokens, value_dim = values.shape
    sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    out = wide.new_empty(len(wide), heads, value_dim)
    library.native().moe_serve_paged_attention(
        *(t.data_ptr() for t in (wide, keys, values, page_table)),
        None if starts is None else starts.data_ptr(),
        lengths.data_ptr(),
        None if firsts is None else firsts.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        len(page_table),
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
        keys.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out.to(query.dtype)
