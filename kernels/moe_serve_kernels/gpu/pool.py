"""The slots that hold experts on a GPU, in the layout the kernels read, for each weight format.

A table `slot_of` [E] int32 gives each expert's slot; -1: in none, and the caller computes its pairs in another way. The
pool's tensors never move, so a captured graph goes on reading the right memory while contents and table change.

| format | gate_up | down | scales |
|---|---|---|---|
| plain | [S, 2, I, H] float32, float16 or bf16 | [S, H, I] | none |
| int8 | the same shapes, int8 | | [S, 2, I], [S, H]: one per output |
| fp8 | the same shapes, e4m3 | | [S, 2, I], [S, H]: one per output |
| int4 | [S, H/2, 2*I] uint8 | [S, I/2, H] uint8 | scale and zero [S, H/g, 2*I], [S, I/g, H] |

int4 has its outputs innermost, so that 16-byte loads feed matrix instructions (the usual layout gets 4-byte loads);
of a group of g inputs, byte row j holds input j in its low and input j + g/2 in its high half. A weight is
scale * (nibble - zero). Scales, zeros and biases (gate_up [S, 2, I], down [S, H]) are float32.

Shape alphabet: S slots, E experts, H hidden, I intermediate, g int4 group size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Format = Literal["plain", "int8", "fp8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
DTYPE_OF = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
GROUP_SIZE = 128


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """One of the two weights of all slots. `num_outputs` x `num_inputs` per slot; gate_up has 2 * I outputs."""

    data: torch.Tensor
    num_outputs: int
    num_inputs: int
    format: Format = "plain"
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        assert self.data.is_contiguous()
        assert self.format == "plain" or self.data.dtype == DTYPE_OF[self.format]
        per_weight = 2 if self.format == "int4" else 1
        assert self.data[0].numel() * per_weight == self.num_outputs * self.num_inputs
        assert (self.scale is None) == (self.format == "plain")
        assert (self.zero is None) == (self.format != "int4")
        for part in (self.scale, self.zero, self.bias):
            assert part is None or (part.dtype == torch.float32 and part.is_contiguous())

    @property
    def num_slots(self) -> int:
        return self.data.shape[0]

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors there are, each with S first: what filling a slot has to write."""
        named = {"data": self.data, "scale": self.scale, "zero": self.zero, "bias": self.bias}
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
    """Uninitialised; `shape` is (2, I, H) or (H, I); `dtype` counts for plain only.

    ValueError: int4 groups do not divide the inputs.
    """
    outputs, inputs = shape[:-1], shape[-1]
    num_outputs = outputs.numel() if isinstance(outputs, torch.Size) else torch.Size(outputs).numel()

    def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(num_slots, *size, dtype=dtype, device=device)

    bias = new(*outputs) if with_bias else None
    if format == "plain":
        return Bank(new(*shape, dtype=dtype), num_outputs, inputs, bias=bias)
    if format != "int4":
        data = new(*shape, dtype=DTYPE_OF[format])
        return Bank(data, num_outputs, inputs, format, new(*outputs), bias=bias)
    if inputs % group_size:
        raise ValueError(f"int4 groups of {group_size} do not divide {inputs} inputs; choose another group size")
    groups = inputs // group_size
    return Bank(
        new(inputs // 2, num_outputs, dtype=torch.uint8),
        num_outputs,
        inputs,
        format,
        new(groups, num_outputs),
        new(groups, num_outputs),
        bias,
        group_size,
    )


def pack_int4(nibbles: torch.Tensor) -> torch.Tensor:
    """nibbles [outputs, groups, g] uint8 in 0..15 -> bytes [inputs/2, outputs] as the kernels read them."""
    low, high = nibbles.chunk(2, dim=-1)
    packed = low | (high << 4)
    return packed.flatten(1).t().contiguous()
