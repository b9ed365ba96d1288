"""The slots that hold experts on a GPU, in the layout the kernels read, for each weight format (weight_format.py).

A table `slot_of` [E] int32 gives each expert's slot; -1: in none, and the caller computes its pairs in another way. The
pool's tensors never move, so a captured graph goes on reading the right memory while contents and table change. Biases
(gate_up [S, 2, I], down [S, H]) are float32.

Shape alphabet: S slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve_kernels.gpu.weight_format import GROUP_SIZE, Format, WeightFormat, weight_format


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """One of the two weights of all slots. `num_outputs` x `num_inputs` per slot; gate_up has 2 * I outputs."""

    data: torch.Tensor
    num_outputs: int
    num_inputs: int
    format: Format = "plain"
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    group_size: int = GROUP_SIZE
    """Inputs that share a scale, where there are groups."""

    def __post_init__(self) -> None:
        form = self.form
        assert form.dtype in (None, self.data.dtype)
        per_weight = 2 if form.is_packed else 1
        assert self.data[0].numel() * per_weight == self.num_outputs * self.num_inputs
        assert (self.scale is None) == (form.scale_of == "nothing")
        assert self.scale is None or self.scale.dtype == form.scale_dtype
        assert (self.zero is None) != form.has_zero
        assert (self.factor is None) != form.has_factor
        assert all(part.is_contiguous() for part in self.parts().values())
        assert all(part is None or part.dtype == torch.float32 for part in (self.zero, self.factor, self.bias))

    @property
    def form(self) -> WeightFormat:
        """What `format` names."""
        return weight_format(self.format)

    @property
    def num_slots(self) -> int:
        return self.data.shape[0]

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors there are, each with S first: what filling a slot has to write."""
        named = {"data": self.data, "scale": self.scale, "zero": self.zero, "factor": self.factor, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPool:
    """S slots for experts."""

    gate_up: Bank
    down: Bank

    def __post_init__(self) -> None:
        assert self.gate_up.num_outputs == 2 * self.down.num_inputs
        assert self.down.num_outputs == self.gate_up.num_inputs
        assert self.gate_up.num_slots == self.down.num_slots
        assert self.gate_up.format == self.down.format

    @property
    def hidden(self) -> int:
        return self.gate_up.num_inputs

    @property
    def inner(self) -> int:
        return self.down.num_inputs

    @property
    def format(self) -> Format:
        return self.down.format


def empty_bank(
    num_slots: int,
    shape: tuple[int, ...],
    format: Format,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_bias: bool = False,
    group_size: int = GROUP_SIZE,
) -> Bank:
    """Uninitialised; `shape` is (2, I, H) or (H, I); `dtype` counts for plain only, `group_size` for formats that have
    groups of that size.

    ValueError: groups do not divide the inputs.
    """
    form, outputs, inputs = weight_format(format), shape[:-1], shape[-1]
    group_size = form.group_size(group_size)
    refusal = form.refusal(inputs, group_size)
    if refusal is not None:
        raise ValueError(f"{format}: {refusal}")
    shapes = form.shapes(outputs, inputs, group_size, dtype)
    if with_bias:
        shapes["bias"] = outputs, torch.float32
    parts = {name: torch.empty(num_slots, *size, dtype=kind, device=device) for name, (size, kind) in shapes.items()}
    return Bank(
        num_outputs=torch.Size(outputs).numel(), num_inputs=inputs, format=format, group_size=group_size, **parts
    )


def pack(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Nibbles [outputs, steps, half] uint8 in 0..15 -> bytes [inputs/2, outputs] as the kernels read them."""
    packed: torch.Tensor = low | (high << 4)
    return packed.flatten(1).t().contiguous()
