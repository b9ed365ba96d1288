"""A model's layers as the C++ kernels read them: struct Model and its table of struct Block.

Knows where tensors lie; runs nothing. Numbers of layers and choices are those of `decoder.py`.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from moe_serve_kernels.cpu.decoder import DecoderBlock, DecoderShape
from moe_serve_kernels.cpu.library import Native, native
from moe_serve_kernels.cpu.linear import LinearWeights


class NativeModel:
    """One model. Its tensors must not move in memory while this object is in use."""

    def __init__(
        self, shape: DecoderShape, blocks: Sequence[DecoderBlock], final_norm: torch.Tensor, head: LinearWeights
    ) -> None:
        """`head`: [V, H]. The caller must have asked `is_available`."""
        library = native()
        assert shape.routing.top_k <= most_choices()
        self.shape, self.blocks, self.final_norm, self.head = shape, blocks, final_norm, head
        self.routes = list(itertools.accumulate((b.router is not None for b in blocks), initial=0))
        """For each block how many before it have a router; last of all, how many there are."""
        members = [_block(library, block, route) for block, route in zip(blocks, self.routes, strict=False)]
        self._table = library.array("Block", members)
        self._memory = _model(library, shape, self._table, blocks, final_norm, head)
        self.address = ctypes.addressof(self._memory)


def most_choices() -> int:
    """Of experts, for one token."""
    return native().value("MOST_CHOICES")


TENSORS = ("input_norm", "post_norm", "q_norm", "k_norm", "sinks", "keys", "values", "correction")
WEIGHTS = ("q", "k", "v", "o", "router", "shared", "shared_gate", "experts")


LATENT_TENSORS = ("q_latent_norm", "kv_latent_norm")
LATENT_WEIGHTS = ("q_latent", "kv_latent", "into_latents", "from_latents")


def _block(library: Native, block: DecoderBlock, route: int) -> Any:
    tensors = dict.fromkeys(LATENT_TENSORS) | {name: getattr(block, name) for name in TENSORS}
    weights = dict.fromkeys(LATENT_WEIGHTS) | {name: getattr(block, name) for name in WEIGHTS}
    if (latents := block.latents) is not None:
        tensors |= {"q_latent_norm": latents.q_norm, "kv_latent_norm": latents.kv_norm}
        weights |= {"q_latent": latents.q, "kv_latent": latents.kv}
        weights |= {"into_latents": latents.heads.into, "from_latents": latents.heads.back}
    assert all(t is None or (t.dtype == _dtype_of(name, block) and t.is_contiguous()) for name, t in tensors.items())
    pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    addresses = {name: None if stored is None else stored.address for name, stored in weights.items()}
    return library.new(
        "Block",
        **pointers,
        **addresses,
        window=block.window or 0,
        route=route,
        kv_bf16=block.keys.dtype == torch.bfloat16,
    )


def _dtype_of(name: str, block: DecoderBlock) -> torch.dtype:
    """Keys and values are kept in one type, float32 or bf16."""
    assert block.keys.dtype in (torch.float32, torch.bfloat16)
    return block.keys.dtype if name in ("keys", "values") else torch.float32


def _model(
    library: Native,
    shape: DecoderShape,
    table: Any,
    blocks: Sequence[DecoderBlock],
    final_norm: torch.Tensor,
    head: LinearWeights,
) -> Any:
    first, routing = blocks[0], shape.routing
    return library.new(
        "Model",
        blocks=ctypes.addressof(table),
        num_blocks=len(blocks),
        final_norm=final_norm.data_ptr(),
        head=head.address,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        num_experts=max(block.router.num_rows for block in blocks if block.router is not None),
        top_k=routing.top_k,
        kv_tokens=first.keys.shape[1],
        page_size=shape.page_size,
        norms_all_heads=first.q_norm is not None and len(first.q_norm) != shape.head_dim,
        rotary_dim=shape.rotary_dim,
        rotary_kind=library.value(f"RotaryKind.{shape.rotary}"),
        score_kind=library.value(f"ScoreKind.{routing.score}"),
        renormalize=routing.renormalize,
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
        best_of_group=routing.best_of_group,
        activation=library.value(f"ActivationKind.{shape.activation.kind}"),
        activation_alpha=shape.activation.alpha,
        activation_limit=shape.activation.limit,
        norm_eps=shape.norm_eps,
        latent_norm_eps=shape.latent_norm_eps,
        attention_scale=shape.attention_scale,
        routing_scale=routing.scaling,
        residual_scale=shape.residual_scale,
        sizes=(),
    )
