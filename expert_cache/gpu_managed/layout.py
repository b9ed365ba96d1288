"""From an expert as the checkpoint stores it to a slot of the GPU kernels' pool.

Quantised experts keep their codes where a kernel reads them (moe_serve_kernels/gpu/weight_format.py). Everything else
becomes floats of the compute type. Works on tensors anywhere: a slot on the GPU, or a slot's image in host memory that
the GPU copies from. Knows no cache.

Shape alphabet: H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from expert_cache.gpu_managed import packed_codes, row_codes
from expert_cache.storage import ExpertStore, ExpertWeights, Matrix, codes_on
from moe_serve_kernels import gpu
from moe_serve_kernels.gpu.pool import Bank, ExpertPool, empty_bank
from moe_serve_kernels.gpu.weight_format import GROUP_SIZE, Format, weight_format
from moe_serve_kernels.quantized import QuantizedRows

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
    shared = set.intersection(*(set(_formats_of(matrix)) for matrix in (like.gate, like.up, like.down)))
    # Exact products of float32 activations with codes do not fit in registers.
    format, group_size = min(shared, default=PLAIN) if dtype != torch.float32 else PLAIN
    return SlotLayout(inner, hidden, format, dtype, like.gate_bias is not None, group_size)


def _formats_of(matrix: Matrix) -> Iterator[tuple[Format, int]]:
    """(format, group size) of each way to keep a matrix's codes as they are; none where no kernel reads them."""
    if isinstance(matrix, QuantizedRows):
        for name in (*row_codes.formats_of(matrix), *packed_codes.formats_of(matrix)):
            yield name, matrix.group if weight_format(name).groups else GROUP_SIZE


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
    if weight_format(layout.format).is_packed:
        packed_codes.write([_codes(weights.gate), _codes(weights.up)], layout.format, gate_up)
        packed_codes.write([_codes(weights.down)], layout.format, down)
    else:
        for half, matrix in enumerate((weights.gate, weights.up)):
            _write_rows(matrix, {name: part[half] for name, part in gate_up.items()})
        _write_rows(weights.down, down)
    write_biases(weights, gate_up, down)


def write_biases(weights: ExpertWeights, gate_up: Parts, down: Parts) -> None:
    """Fill one slot's biases, where it has any."""
    if "bias" not in down:
        return
    assert weights.gate_bias is not None
    assert weights.up_bias is not None
    assert weights.down_bias is not None
    for half, bias in enumerate((weights.gate_bias, weights.up_bias)):
        gate_up["bias"][half].copy_(bias, non_blocking=True)
    down["bias"].copy_(weights.down_bias, non_blocking=True)


def _write_rows(matrix: Matrix, target: Parts) -> None:
    if "scale" in target:
        row_codes.write_codes(_codes(matrix), target)
    else:
        row_codes.write_floats(matrix, target)


def _codes(matrix: Matrix) -> QuantizedRows:
    """`matrix`, whose codes the layout keeps."""
    assert isinstance(matrix, QuantizedRows)
    return matrix
