"""Random quantised experts in every form that the CPU kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve_kernels.cpu.expert_mlp import MLPWeights
from moe_serve_kernels.quantized import BITS, Kind, QuantizedRows


@dataclass(frozen=True)
class Form:
    """How a matrix is quantised. group 0: one scale per row."""

    kind: Kind
    group: int = 0
    scale_dtype: torch.dtype = torch.float32
    rows_per_scale: int = 1
    zero: int = 0
    zeros: bool = False

    def __str__(self) -> str:
        parts = [self.kind, f"g{self.group}", str(self.scale_dtype).removeprefix("torch."), f"r{self.rows_per_scale}"]
        return "-".join([*parts, *(["zeros"] if self.zeros else [])])


FORMS = [
    Form("int8"),
    Form("int8", 128, torch.bfloat16),
    Form("uint8", 0, torch.float16, zero=128),
    Form("uint8", 64, zeros=True),
    Form("fp8", 0, torch.bfloat16),
    Form("fp8", 128, rows_per_scale=128),
    Form("fp8", 0, rows_per_scale=10_000),
    Form("int4", 128, torch.bfloat16, zero=8),
    Form("int4", 128, torch.float16, zeros=True),
    Form("int4", 32, zero=8),
    Form("int4", 0, zero=8),
    Form("int4", 256, zero=8),
    Form("int4", 64, zeros=True),
    Form("fp4", 32, torch.uint8),
    Form("fp4", 128),
    Form("fp4", 16, torch.float8_e4m3fn),
]


def make_matrix(form: Form, rows: int, columns: int, generator: torch.Generator) -> QuantizedRows:
    """Weights of standard deviation about 1 / sqrt(columns)."""

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    codes = draw(0, 256, rows, -(-columns * BITS[form.kind] // 8))
    if form.kind == "fp8":
        codes[(codes & 0x7F) == 0x7F] -= 1  # no NaN
    group = form.group or columns
    rows_per_scale = min(form.rows_per_scale, rows)
    shape = (-(-rows // rows_per_scale), -(-columns // group))
    spread = {"int4": 4.6, "fp4": 2.7, "fp8": 120.0}.get(form.kind, 74.0) * columns**0.5
    factor = torch.tensor([1 / (100 * spread)]) if form.scale_dtype == torch.float8_e4m3fn else None
    if form.scale_dtype == torch.uint8:
        scales = draw(118, 124, *shape)
    else:
        wide = (torch.rand(shape, generator=generator) + 0.5) * (100 if factor is not None else 1 / spread)
        scales = wide.to(form.scale_dtype)
    zeros = draw(0, 2 ** BITS[form.kind], rows, shape[1]) if form.zeros else None
    return QuantizedRows(form.kind, codes, scales, columns, group, rows_per_scale, zeros, form.zero, factor)


def make_expert(form: Form, hidden: int, inner: int, seed: int = 0, biases: bool = False) -> MLPWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    gate, up, down = (make_matrix(form, *shape, generator) for shape in shapes)
    if not biases:
        return MLPWeights(gate, up, down)
    return MLPWeights(gate, up, down, *(torch.randn(n, generator=generator) for n, _ in shapes))
