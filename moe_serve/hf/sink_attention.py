"""Attention with sinks (GPT-OSS): one extra logit per head that takes weight but has no value.

Shape alphabet: N sequences, h heads of the keys, R query rows of a head, D head dim, C context length.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

SINK_DIMS = 8
"""Added to the head dim: torch's fused kernels take multiples of 8."""


def by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """query [N, h, R, D], keys [N, h, C, D], values [N, h, C, Dv] -> [N, h, R, Dv], with all scores in memory.

    `sinks` [Hq] is laid out head-major over (h, R) for decode (R = G) and over h alone for prefill (h = Hq).
    """
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    per_row = sinks.view(1, scores.shape[1], -1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
    weights = torch.cat([scores, per_row], dim=-1).float().softmax(dim=-1)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)


def by_key(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """The same without scores in memory: the sink is one more key, with a value of 0.

    Two added dimensions carry its logit, in two parts so that no digit of float32 is lost to bf16: the query holds
    logit / scale, the sink's key 1, and every other key 0.
    """
    num_seqs, heads, rows, dim = query.shape
    context = keys.shape[2]
    logits = (sinks.float() / scale).view(1, heads, -1, 1).expand(num_seqs, heads, rows, 1)
    high = logits.to(query.dtype)
    low = (logits - high.float()).to(query.dtype)
    wide_query = pad(torch.cat([query, high, low], -1), (0, SINK_DIMS - 2))
    wide_keys = keys.new_zeros(num_seqs, heads, context + 1, dim + SINK_DIMS)
    wide_keys[:, :, :context, :dim] = keys
    wide_keys[:, :, context:, dim : dim + 2] = 1
    wide_mask = None if mask is None else pad(mask, (0, 1))
    return sdpa(wide_query, wide_keys, pad(values, (0, 0, 0, 1)), attn_mask=wide_mask, scale=scale)
