"""All layers of a step for any number of tokens as one call, where every expert is in place: prompts, larger batches.

The kernels are those of `LayerParts` in the same order, so a token's bits are the same; Python is not asked in between.

Shape alphabet: T tokens, H hidden, K choices, E experts, L layers with a router.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from moe_serve_kernels.cpu.decoder import DecodeInputs
from moe_serve_kernels.cpu.layer_parts import step_of
from moe_serve_kernels.cpu.library import native
from moe_serve_kernels.cpu.native_model import NativeModel


class Choices(NamedTuple):
    """What a step's routers chose."""

    ids: torch.Tensor
    """[L, T, K] int64."""
    weights: torch.Tensor
    """[L, T, K] float32."""
    counts: torch.Tensor
    """[L, E] int64: the pairs that each expert had."""


class PromptStep:
    """One model's layers; every block with a router has its experts."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        routers = [block.router for block in model.blocks if block.router is not None]
        self._num_experts = max(router.num_rows for router in routers)

    def run(self, inputs: DecodeInputs) -> Choices:
        """`inputs.x` [T, H] becomes what the layers make of it. Raises MemoryError."""
        num_routes, count = self._model.routes[-1], len(inputs.x)
        ids = torch.empty(num_routes, count, self._model.shape.routing.top_k, dtype=torch.int64)
        weights = torch.empty(ids.shape)
        counts = torch.zeros(num_routes, self._num_experts, dtype=torch.int64)
        step = step_of(inputs)
        step.x, step.ids, step.weights = inputs.x.data_ptr(), ids.data_ptr(), weights.data_ptr()
        where = (self._model.address, ctypes.addressof(step), counts.data_ptr())
        if not native().moe_serve_prompt_step(*where, torch.get_num_threads()):
            raise MemoryError("no memory for a step's intermediate results")
        return Choices(ids, weights, counts)
