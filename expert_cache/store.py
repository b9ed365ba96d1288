"""ExpertStore: every expert's weights where they lie, in memory-mapped safetensors files.

The cold tier. Nothing is copied: `weights` returns views of the mapping, whatever layout the
checkpoint has, so that loading a model adds no anonymous memory for its experts and the kernel
may drop their pages whenever it needs the RAM. Knows nothing of caching or of Hugging Face names.

Shape alphabet: E experts per layer, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert as stored: views, possibly strided, in the checkpoint's dtype.

    gate, up [I, H]; down [H, I]; biases [I], [I], [H] or all None. Where the checkpoint keeps gate
    and up as one matrix in this order, `gate_up` [2I, H] is a view of both.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_up: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def num_elements(self) -> int:
        """Elements of the three matrices."""
        return self.gate.numel() + self.up.numel() + self.down.numel()


@dataclass(frozen=True, slots=True)
class FusedLayout:
    """How a fused gate_up tensor holds its halves (see moe_serve.hf.family.Family)."""

    transposed: bool = False
    interleaved: bool = False


class ExpertStore:
    """Expert weights by (decoder layer, expert).

    `tensors[layer]` maps either (part, expert) -> 2-D tensor or (part, None) -> 3-D tensor with
    the expert dimension first; parts are gate, up, down, gate_up, gate_up_bias, down_bias.
    """

    def __init__(
        self,
        tensors: Mapping[int, Mapping[tuple[str, int | None], torch.Tensor]],
        num_experts: int,
        fused: FusedLayout | None = None,
    ) -> None:
        self._tensors = tensors
        self._fused = fused or FusedLayout()
        self.layers = tuple(sorted(tensors))
        """Decoder layers that have experts."""
        self.num_experts = num_experts

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Views of one expert's weights; touching them reads the file."""
        parts = self._tensors[layer]
        down = self._matrix(parts, "down", expert)
        if ("gate", expert) in parts:
            return ExpertWeights(parts["gate", expert], parts["up", expert], down)
        gate_up = self._matrix(parts, "gate_up", expert)
        gate, up = self._halves(gate_up)
        biases = self._biases(parts, expert)
        return ExpertWeights(gate, up, down, None if self._fused.interleaved else gate_up, *biases)

    def _matrix(self, parts: Mapping[tuple[str, int | None], torch.Tensor], part: str, expert: int) -> torch.Tensor:
        """[out, in] view of a part, from whichever layout the checkpoint has."""
        if (part, expert) in parts:
            return parts[part, expert]
        matrix = parts[part, None][expert]
        return matrix.t() if self._fused.transposed else matrix

    def _halves(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the output dimension (first) of a fused tensor into gate and up."""
        if self._fused.interleaved:
            return gate_up[::2], gate_up[1::2]
        half = gate_up.shape[0] // 2
        return gate_up[:half], gate_up[half:]

    def _biases(
        self, parts: Mapping[tuple[str, int | None], torch.Tensor], expert: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if ("gate_up_bias", None) not in parts:
            return None, None, None
        gate, up = self._halves(parts["gate_up_bias", None][expert])
        return gate, up, parts["down_bias", None][expert]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights(self.layers[0], 0).down.dtype

    @property
    def expert_elements(self) -> int:
        """Elements of one expert; all experts of a model have the same shape."""
        return self.weights(self.layers[0], 0).num_elements

    @property
    def num_total(self) -> int:
        """Experts over all layers."""
        return len(self.layers) * self.num_experts
