"""ggml's blocks in the CPU's kernels: the bits of the float32 matrices that the gguf package decodes them to."""

from __future__ import annotations

import gguf
import pytest
import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_mlp import Activation, Matrix, MLPWeights, are_readable, expert_mlp
from moe_serve_kernels.quantized import READABLE_BLOCKS, BlockRows, row_bytes

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()},
}
"""Where float16 scales are in a block."""


def random_rows(kind: str, rows: int, columns: int, generator: torch.Generator) -> BlockRows:
    """Every bit random, but scales are small numbers of both signs."""
    data = torch.randint(0, 256, (rows, row_bytes(kind, columns)), generator=generator, dtype=torch.uint8)
    blocks = data.view(rows, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    for place in HALVES[kind]:
        scales = torch.rand(blocks.shape[:2], generator=generator) * 1e-3 - 3e-4
        blocks[..., place : place + 2] = scales.half()[..., None].view(torch.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = torch.randint(115, 122, blocks.shape[:2], generator=generator, dtype=torch.uint8)
    return BlockRows(kind, data, columns)


def run(x: torch.Tensor, count: int, matrices: list[Matrix]) -> torch.Tensor:
    out = torch.zeros(count, x.shape[1])
    gate, up, down = matrices
    expert_mlp(x, torch.arange(count), [(0, count)], [MLPWeights(gate, up, down)], Activation("silu"), out)
    return out


def check(kinds: tuple[str, str, str], hidden: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(hidden)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    rows = [random_rows(kind, *shape, generator) for kind, shape in zip(kinds, shapes, strict=True)]
    x = torch.randn(33, hidden, generator=generator)
    for count in (1, 2, 5, 7, 33):
        assert torch.equal(run(x, count, [*rows]), run(x, count, [matrix.dequantized() for matrix in rows]))


@pytest.mark.parametrize("kind", READABLE_BLOCKS)
def test_every_type_gives_the_bits_of_its_floats(kind: str) -> None:
    check((kind, kind, kind), 1280, 256)


def test_the_matrices_of_an_expert_may_differ_in_type() -> None:
    check(("Q4_K", "Q4_K", "Q6_K"), 256, 512)
    check(("Q8_0", "Q5_0", "MXFP4"), 32, 96)


def test_every_float16_is_read_exactly() -> None:
    """With the identity as the other matrices: one value per output."""
    halves = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    first = torch.zeros(1, len(halves))
    first[0, 0] = 1.0
    for count in (1, 20):
        out = torch.zeros(count, len(halves))
        expert = MLPWeights(first.half(), first.half(), halves[:, None].contiguous())
        expert_mlp(first, torch.zeros(count, dtype=torch.int64), [(0, count)], [expert], Activation("relu"), out)
        assert torch.equal(out, halves.float().expand(count, -1))


def test_types_without_a_kernel_are_not_readable() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (4, row_bytes("IQ2_XS", 256)), generator=generator, dtype=torch.uint8)
    assert not are_readable([BlockRows("IQ2_XS", data, 256)])
