"""What a model's decoder layers are to the kernel that runs a whole decoding step (decode_step.py).

RMSNorm, rotary attention over paged keys and values with or without biases, norms of heads, sinks, windows and latents,
RMSNorm, then a router and experts, an MLP for all tokens, or both; all added to the residual stream. Knows no model by
name and runs nothing.

Shape alphabet: T tokens of S sequences, H hidden, Hq query and Hk key/value heads of D (values of Dv), R rotary
values of a head, E experts, P * B tokens that the pages hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.cpu.expert_mlp import Activation, MLPWeights
from moe_serve_kernels.cpu.latent_heads import LatentHeads
from moe_serve_kernels.cpu.linear import LinearWeights
from moe_serve_kernels.routings import Routing

Rotary = Literal["halves", "neighbours", "neighbours_to_halves"]
"""Which values of a head are rotated against each other (rotary.inc)."""


@dataclass(frozen=True, slots=True)
class Latents:
    """A narrow row per token that is cached in the place of keys and values, and a narrow one for queries, or none
    (DeepSeek-V2's latent attention)."""

    kv: LinearWeights
    """[rank + R, H]: the latents, and the keys' rotary values, which all heads share."""
    kv_norm: torch.Tensor
    """[rank]."""
    heads: LatentHeads
    q: LinearWeights | None = None
    """[q rank, H]: what the block's `q` takes; None: what the layer is given."""
    q_norm: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderBlock:
    """One decoder layer; tensors float32 and contiguous, none may move in memory. Keys and values may be bf16."""

    q: LinearWeights
    o: LinearWeights
    input_norm: torch.Tensor
    """[H], before attention."""
    post_norm: torch.Tensor
    """[H], before what follows attention."""
    keys: torch.Tensor
    """[Hk, P * B, D]; with latents [1, P * B, rank + R]."""
    values: torch.Tensor | None
    """[Hk, P * B, Dv]; None with latents."""
    k: LinearWeights | None = None
    v: LinearWeights | None = None
    latents: Latents | None = None
    """In the place of `k` and `v`."""
    q_norm: torch.Tensor | None = None
    """[D] for each head, or [Hq * D] over all of them."""
    k_norm: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    """[Hq] one more logit per head, without a value."""
    window: int | None = None
    """Tokens that a query sees, its own included."""
    router: LinearWeights | None = None
    """[E, H]; None: a layer without experts."""
    correction: torch.Tensor | None = None
    """[E] added to what experts are chosen by, not to their weights."""
    experts: ExpertLayer | None = None
    """None in a layer with a router: `DecodeStep.until_experts` is all that can be asked for."""
    shared: MLPWeights | None = None
    """What every token goes through: the shared experts, or the MLP of a layer without experts."""
    shared_gate: LinearWeights | None = None
    """[1, H] whose sigmoid `shared` is multiplied by (Qwen2-MoE)."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What all layers share."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    norm_eps: float
    attention_scale: float
    activation: Activation
    routing: Routing
    rotary_dim: int
    """R of a head's values are rotated: the first ones, or with latents the last ones."""
    rotary: Rotary = "halves"
    latent_norm_eps: float = 0.0
    residual_scale: float = 1.0
    """What a layer's two parts are multiplied by before they are added (Granite)."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """The tokens of a step. With `DecodeStep` each is of another sequence; with `LayerParts` some may be of one."""

    x: torch.Tensor
    """[T, H] float32 embedded tokens; becomes what the layers make of them."""
    cos: torch.Tensor
    """[T, rotary_dim / 2] float32 of each token's position."""
    sin: torch.Tensor
    kv_slots: torch.Tensor
    """[T] int64: page * B + offset of each token's own key and value."""
    page_table: torch.Tensor
    """[S, pages] int64."""
    lengths: torch.Tensor
    """[T] int64: tokens that each one sees, itself included."""
    starts: torch.Tensor | None = None
    """[S + 1] int64: each sequence's first row, and T; those of a sequence see one token more from row to row. None:
    every token is a sequence, S = T."""
