"""The ways a slot can hold weights: which tensors there are, of which shapes, and what a loop step reads of them.

| format | gate_up | down | scale | of a scale |
|---|---|---|---|---|
| plain | [S, 2, I, H] float32, float16 or bf16 | [S, H, I] | none | |
| int8, fp8 | the same shapes, int8 or e4m3 | | [S, 2, I], [S, H] | one output |
| int8_groups | the same shapes, int8 | | [S, 2, H/g, I], [S, I/g, H] | g inputs of an output |
| fp8_blocks | the same shapes, e4m3 | | [S, 2, H/128, I/128], [S, I/128, H/128] | 128 inputs of 128 outputs |
| int4 | [S, H/2, 2*I] uint8 | [S, I/2, H] uint8 | [S, H/g, 2*I], [S, I/g, H] | g inputs of an output |
| mxfp4, nvfp4 | the same shapes as int4, uint8 | | the same shapes as int4, uint8 | 32 or 16 inputs of an output |

Quotients round up. Scales are float32; those of mxfp4 are e8m0 bytes (2 ** (byte - 127)), those of nvfp4 e4m3 bytes.
nvfp4 has one more float32 per output, `factor` [S, 2, I], [S, H]. int4 has a `zero` of each scale, in float32. A weight
is scale * (code - zero) * factor; what a format lacks is left out.

Packed formats (int4, mxfp4, nvfp4) have their outputs innermost, so that 16-byte loads feed matrix instructions (the
usual layout gets 4-byte loads). A loop step takes `2 * half` inputs: byte row j of it holds input j in its low and
input half + j in its high nibbles. int4 steps by one group; mxfp4 and nvfp4 by two, the first in the low nibbles.

Shape alphabet: S slots, H hidden, I intermediate, g group size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Format = Literal["plain", "int8", "fp8", "int8_groups", "fp8_blocks", "int4", "mxfp4", "nvfp4"]
FORMATS: tuple[Format, ...] = get_args(Format)
GROUP_SIZE = 128
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Part of a slot -> its shape and data type."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One of FORMATS."""

    dtype: torch.dtype | None = None
    """Of codes; None: floats of the compute type."""
    is_packed: bool = False
    scale_of: Literal["nothing", "output", "group"] = "nothing"
    scale_dtype: torch.dtype = torch.float32
    groups: tuple[int, ...] = ()
    """Inputs that may share a scale; the last is the default."""
    rows_per_scale: int = 1
    has_zero: bool = False
    has_factor: bool = False

    def group_size(self, wanted: int) -> int:
        """The inputs of a group: `wanted`, where the format has groups of that size."""
        return wanted if not self.groups or wanted in self.groups else self.groups[-1]

    def half(self, group_size: int) -> int:
        """Byte rows of a packed loop step."""
        return group_size // 2 if self.has_zero else group_size

    def refusal(self, inputs: int, group_size: int) -> str | None:
        """Why a matrix with so many inputs cannot be held; None where it can."""
        step = 2 * self.half(group_size)
        if self.is_packed and inputs % step:
            return f"steps of {step} inputs do not divide {inputs}; choose another group size"
        return None

    def shapes(self, outputs: tuple[int, ...], inputs: int, group_size: int, dtype: torch.dtype) -> Shapes:
        """The parts of one slot but its bias; `dtype`: of plain weights."""
        data = (inputs // 2, math.prod(outputs)) if self.is_packed else (*outputs, inputs)
        parts: Shapes = {"data": (data, self.dtype or dtype)}
        if self.scale_of != "nothing":
            parts["scale"] = self._scales(outputs, inputs, group_size), self.scale_dtype
        if self.has_zero:
            parts["zero"] = self._scales(outputs, inputs, group_size), torch.float32
        if self.has_factor:
            parts["factor"] = outputs, torch.float32
        return parts

    def _scales(self, outputs: tuple[int, ...], inputs: int, group_size: int) -> tuple[int, ...]:
        groups = -(-inputs // group_size)
        if self.scale_of == "output":
            return outputs
        if self.is_packed:
            return groups, math.prod(outputs)
        return *outputs[:-1], groups, -(-outputs[-1] // self.rows_per_scale)


def weight_format(name: Format) -> WeightFormat:
    """The format of that name."""
    return _FORMATS[name]


_FORMATS: dict[Format, WeightFormat] = {
    "plain": WeightFormat(),
    "int8": WeightFormat(torch.int8, scale_of="output"),
    "fp8": WeightFormat(torch.float8_e4m3fn, scale_of="output"),
    "int8_groups": WeightFormat(torch.int8, scale_of="group", groups=(32, 64, 128)),
    "fp8_blocks": WeightFormat(torch.float8_e4m3fn, scale_of="group", groups=(128,), rows_per_scale=128),
    "int4": WeightFormat(torch.uint8, True, "group", groups=(32, 64, 128), has_zero=True),
    "mxfp4": WeightFormat(torch.uint8, True, "group", torch.uint8, groups=(32,)),
    "nvfp4": WeightFormat(torch.uint8, True, "group", torch.uint8, groups=(16,), has_factor=True),
}
