"""A decoding step of a few sequences on the CPU as one call: attention, routing and experts of all layers.

Between the short layers of one token, waking threads and asking Python what comes next take longer than reading the
weights. Here one team of threads runs the whole step, or each layer up to its experts if the caller runs those.
Float32 activations on weights as they are stored. (llama.cpp's graphs on CPUs; CUDA graphs on GPUs.)

Shape alphabet: T tokens (one per sequence), H hidden, K choices, V vocabulary, L layers with a router.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.decoder import DecodeInputs, DecoderBlock, DecoderShape
from moe_serve_kernels.cpu.library import Native, native
from moe_serve_kernels.cpu.linear import LinearWeights


class DecodeStep:
    """One model's layers, ready to be run for at most `most_tokens()` tokens."""

    def __init__(
        self, shape: DecoderShape, blocks: Sequence[DecoderBlock], final_norm: torch.Tensor, head: LinearWeights
    ) -> None:
        """`head`: [V, H]. The caller must have asked `is_available`."""
        self._native = library = native()
        assert shape.routing.top_k <= most_choices()
        self._shape = shape
        self._kept = (blocks, final_norm, head)
        self._routes = list(itertools.accumulate((b.router is not None for b in blocks), initial=0))
        members = [_block(library, block, route) for block, route in zip(blocks, self._routes, strict=False)]
        self._blocks = library.array("Block", members)
        self._model = _model(library, shape, self._blocks, blocks, final_norm, head)
        self._model_at = ctypes.addressof(self._model)
        self._num_threads = torch.get_num_threads()
        self._memory = self._new_memory()
        sizes = range(1, most_tokens() + 1)
        self._outputs = [_Outputs(self._routes[-1], num_tokens, shape, head.num_rows) for num_tokens in sizes]

    def _new_memory(self) -> torch.Tensor:
        return torch.empty(self._native.moe_serve_decode_memory(self._model_at, most_tokens(), self._num_threads))

    def run(self, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole step: logits [T, V], chosen experts [L, T, K] int64 and their weights [L, T, K].

        All three are overwritten by the next step of as many tokens.
        """
        outputs, step = self._step(inputs)
        self._native.moe_serve_decode_step(self._model_at, step, self._memory.data_ptr(), self._num_threads)
        return outputs.logits, outputs.ids, outputs.weights

    def until_experts(self, block: int, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer up to its experts: their input [T, H], and ids and weights [T, K].

        `shared`, then adding residual_scale times what the experts make of that to `inputs.x`, completes the layer.
        Without a router it is complete, and what is returned means nothing.
        """
        outputs, step = self._step(inputs)
        memory, threads = self._memory.data_ptr(), self._num_threads
        self._native.moe_serve_decode_until_experts(self._model_at, step, block, memory, threads)
        route = min(self._routes[block], len(outputs.ids) - 1)
        return outputs.normed, outputs.ids[route], outputs.weights[route]

    def shared(self, block: int, inputs: DecodeInputs) -> None:
        """The shared expert's part of a layer that `until_experts` has begun, if it has one: while others are read."""
        if self._kept[0][block].shared is not None:
            _, step = self._step(inputs)
            memory, threads = self._memory.data_ptr(), self._num_threads
            self._native.moe_serve_decode_shared(self._model_at, step, block, memory, threads)

    def head(self, inputs: DecodeInputs) -> torch.Tensor:
        """Logits [T, V] of `inputs.x`; overwritten by the next step of as many tokens."""
        outputs, step = self._step(inputs)
        self._native.moe_serve_decode_head(self._model_at, step, self._memory.data_ptr(), self._num_threads)
        return outputs.logits

    def _step(self, inputs: DecodeInputs) -> tuple[_Outputs, int]:
        count, hidden = inputs.x.shape
        assert 0 < count <= len(self._outputs)
        assert hidden == self._shape.hidden
        assert inputs.x.dtype == inputs.cos.dtype == inputs.sin.dtype == torch.float32
        tensors = (inputs.x, inputs.cos, inputs.sin, inputs.kv_slots, inputs.page_table, inputs.lengths)
        assert all(tensor.is_contiguous() for tensor in tensors)
        outputs = self._outputs[count - 1]
        step = outputs.step
        step.cos, step.sin = inputs.cos.data_ptr(), inputs.sin.data_ptr()
        step.kv_slots, step.lengths = inputs.kv_slots.data_ptr(), inputs.lengths.data_ptr()
        step.page_table, step.table_width = inputs.page_table.data_ptr(), inputs.page_table.shape[1]
        step.x = inputs.x.data_ptr()
        return outputs, ctypes.addressof(step)


class _Outputs:
    """The memory for the results of a step of `num_tokens` tokens."""

    def __init__(self, num_routes: int, num_tokens: int, shape: DecoderShape, vocab_size: int) -> None:
        top_k = shape.routing.top_k
        self.normed = torch.empty(num_tokens, shape.hidden)
        self.ids = torch.empty(num_routes, num_tokens, top_k, dtype=torch.int64)
        self.weights = torch.empty(num_routes, num_tokens, top_k)
        self.logits = torch.empty(num_tokens, vocab_size)
        outputs = {name: getattr(self, name).data_ptr() for name in ("normed", "ids", "weights", "logits")}
        inputs = dict.fromkeys(("cos", "sin", "kv_slots", "page_table", "lengths", "x"))
        self.step = native().new("Step", num_tokens=num_tokens, table_width=0, **inputs, **outputs)


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when a `DecodeStep` for activations of `dtype` can run here."""
    return device.type == "cpu" and dtype == torch.float32 and library.load() is not None


def most_tokens() -> int:
    """Of one step: with more, weights are no longer all that takes time."""
    return native().value("STREAM_MAX_TOKENS")


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
    assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors.values())
    side_by_side = (block.q, block.k, block.v) if latents is None else (latents.q or block.q, latents.kv)
    assert len({w.weight.dtype for w in side_by_side if w is not None}) == 1
    pointers = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    addresses = {name: None if stored is None else stored.address for name, stored in weights.items()}
    return library.new("Block", **pointers, **addresses, window=block.window or 0, route=route)


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
