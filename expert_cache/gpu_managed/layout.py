"""From an expert as the checkpoint stores it to a slot of the GPU kernels' pool.

Quantised experts keep their codes where a kernel reads them: int8 and fp8 with one scale per output, int4 in groups
of 32, 64 or 128 inputs. Everything else becomes floats of the compute type. Works on tensors anywhere: a slot on the
GPU, or a slot's image in host memory that the GPU copies from. Knows no cache.

Shape alphabet: H hidden, I intermediate, G groups of inputs, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from expert_cache.storage import ExpertStore, ExpertWeights, Matrix, codes_on
from moe_serve_kernels import gpu
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from moe_serve_kernels.gpu.pool import GROUP_SIZE, Bank, ExpertPool, Format, empty_bank, pack_int4
from moe_serve_kernels.quantized import QuantizedRows

GROUP_SIZES = (32, 64, 128)
ROW_FORMATS: dict[tuple[str, int], Format] = {("int8", 0): "int8", ("uint8", 128): "int8", ("fp8", 0): "fp8"}
"""By kind and zero point."""
PLAIN: tuple[Format, int] = ("plain", GROUP_SIZE)
Parts = Mapping[str, torch.Tensor]
"""A bank's tensors (Bank.parts) of one slot."""


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """What every slot of a pool looks like."""

    inner: int
    hidden: int
    format: Format
    dtype: torch.dtype
    """Of plain weights."""
    has_bias: bool
    group_size: int = GROUP_SIZE

    def pool(self, num_slots: int, device: torch.device) -> ExpertPool:
        """A pool of `num_slots` slots, uninitialised."""
        both, down = (2, self.inner, self.hidden), (self.hidden, self.inner)
        return ExpertPool(self._bank(num_slots, both, device), self._bank(num_slots, down, device))

    def _bank(self, num_slots: int, shape: tuple[int, ...], device: torch.device) -> Bank:
        return empty_bank(
            num_slots, shape, self.format, self.dtype, device, with_bias=self.has_bias, group_size=self.group_size
        )

    def part_bytes(self) -> list[int]:
        """Bytes of each part of one slot."""
        one = self.pool(1, torch.device("meta"))
        return [tensor.nbytes for bank in (one.gate_up, one.down) for tensor in bank.parts().values()]


def layout_of(like: ExpertWeights, dtype: torch.dtype) -> SlotLayout:
    """The layout for experts like this one, computed with in `dtype`."""
    inner, hidden = like.gate.shape
    formats = {_format_of(matrix) for matrix in (like.gate, like.up, like.down)}
    format, group_size = formats.pop() if len(formats) == 1 else PLAIN
    if dtype == torch.float32:  # exact products of codes do not fit in registers
        format, group_size = PLAIN
    return SlotLayout(inner, hidden, format, dtype, like.gate_bias is not None, group_size)


def _format_of(matrix: Matrix) -> tuple[Format, int]:
    """(format, group size) that keeps a matrix's codes as they are; plain where no kernel reads them."""
    if isinstance(matrix, QuantizedRows):
        per_row = matrix.num_groups == 1 and matrix.rows_per_scale in (1, matrix.shape[0]) and matrix.zeros is None
        if per_row and (matrix.kind, matrix.zero) in ROW_FORMATS:
            return ROW_FORMATS[matrix.kind, matrix.zero], GROUP_SIZE
        whole_groups = matrix.group in GROUP_SIZES and matrix.columns % matrix.group == 0
        if matrix.kind == "int4" and whole_groups and matrix.rows_per_scale == 1:
            return "int4", matrix.group
    return PLAIN


def device_bytes(store: ExpertStore, dtype: torch.dtype, device: torch.device) -> int:
    """Memory that an expert takes where it is computed: as it is stored, and on a GPU at least what its slot takes."""
    if not gpu.is_available(device):
        return store.slot_bytes
    layout = layout_of(store.weights(store.layers[0], 0), dtype)
    return max(store.slot_bytes, sum(layout.part_bytes()))


def slot_of_bank(bank: Bank, slot: int) -> dict[str, torch.Tensor]:
    """Views of one slot's parts."""
    return {name: tensor[slot] for name, tensor in bank.parts().items()}


def write_slot(weights: ExpertWeights, layout: SlotLayout, gate_up: Parts, down: Parts) -> None:
    """Fill one slot's parts, on the device of the weights or another, which converts codes then."""
    weights = codes_on(gate_up["data"].device, weights)
    if layout.format == "int4":
        _write_groups([weights.gate, weights.up], layout.group_size, gate_up)
        _write_groups([weights.down], layout.group_size, down)
    else:
        for half, matrix in enumerate((weights.gate, weights.up)):
            _write_rows(matrix, {name: part[half] for name, part in gate_up.items()})
        _write_rows(weights.down, down)
    if layout.has_bias:
        assert weights.gate_bias is not None
        assert weights.up_bias is not None
        assert weights.down_bias is not None
        for half, bias in enumerate((weights.gate_bias, weights.up_bias)):
            gate_up["bias"][half].copy_(bias, non_blocking=True)
        down["bias"].copy_(weights.down_bias, non_blocking=True)


def _write_rows(matrix: Matrix, target: Parts) -> None:
    """One matrix with its inputs innermost."""
    data = target["data"]
    if "scale" not in target:
        data.copy_(as_tensor(matrix, data.dtype), non_blocking=True)
        return
    assert isinstance(matrix, QuantizedRows)
    codes = matrix.codes[:, : matrix.columns]
    data.view(torch.uint8).copy_(codes ^ 128 if matrix.kind == "uint8" else codes, non_blocking=True)
    target["scale"].copy_(matrix.scale_values()[:, 0].expand(matrix.shape[0]), non_blocking=True)


def _write_groups(matrices: list[Matrix], group_size: int, target: Parts) -> None:
    """int4 matrices, one below the other, with their outputs innermost."""
    nibbles, scales, zeros = zip(*(_groups_of(matrix, group_size) for matrix in matrices), strict=True)
    target["data"].copy_(pack_int4(torch.cat(nibbles)), non_blocking=True)
    target["scale"].copy_(torch.cat(scales).t(), non_blocking=True)
    target["zero"].copy_(torch.cat(zeros).t(), non_blocking=True)


def _groups_of(matrix: Matrix, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nibbles uint8 [outputs, G, g], scales and zeros float32 [outputs, G]."""
    assert isinstance(matrix, QuantizedRows)
    codes = torch.stack((matrix.codes & 15, matrix.codes >> 4), dim=2).flatten(1)[:, : matrix.columns]
    scales = matrix.scale_values()
    zeros = torch.full_like(scales, matrix.zero) if matrix.zeros is None else matrix.zeros.float()
    return codes.reshape(len(codes), -1, group_size), scales, zeros
