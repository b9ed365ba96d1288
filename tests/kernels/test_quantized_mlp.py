"""expert_mlp on quantised weights: the numbers, and that nothing but a token and its expert decides about them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_mlp import (
    Activation,
    Matrix,
    MLPWeights,
    are_readable,
    expert_mlp,
    finish_expert_mlp,
    start_expert_mlp,
)
from moe_serve_kernels.quantized import Kind, QuantizedRows, decode
from tests.kernels.quantized_experts import FORMS, Form, make_expert, make_matrix
from tests.support.cpu_references import expert_mlp_reference

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

SILU = Activation("silu")
SENTINEL = 77.0
COUNTS = [1, 2, 3, 4, 5, 6, 7, 16, 29, 70]
"""Tokens of a segment: every row-streaming tile, one and several tiles of the blocked kernel."""


def run(
    x: torch.Tensor, tokens: torch.Tensor, segments: list[tuple[int, int]], weights: list[MLPWeights]
) -> torch.Tensor:
    out = torch.full((len(tokens), x.shape[1]), SENTINEL)
    expert_mlp(x, tokens, segments, weights, SILU, out)
    return out


def segments_of(counts: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(torch.tensor([0, *counts]).cumsum(0).tolist()))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (320, 200), (64, 72), (8, 8), (136, 776)])
def test_every_form_and_token_count(form: Form, hidden: int, inner: int) -> None:
    torch.manual_seed(hidden)
    weights = [make_expert(form, hidden, inner, seed=i) for i in range(len(COUNTS))]
    x, tokens, segments = torch.randn(40, hidden), torch.randint(40, (sum(COUNTS),)), segments_of(COUNTS)
    expected = torch.full((len(tokens), hidden), SENTINEL, dtype=torch.float64)
    expert_mlp_reference(x.double(), tokens, segments, weights, SILU, expected)
    got = run(x, tokens, segments, weights).double()
    scale = expected.square().mean().sqrt()
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "uint8", "fp8"])
def test_odd_widths_of_bytes(kind: Kind) -> None:
    form = Form(kind, zero=128 if kind == "uint8" else 0)
    for hidden, inner in [(1, 1), (37, 51), (70, 129)]:
        weights = [make_expert(form, hidden, inner, seed=i, biases=True) for i in range(2)]
        x, tokens = torch.randn(9, hidden), torch.randint(9, (23,))
        segments = [(0, 3), (3, 23)]
        expected = torch.empty(23, hidden, dtype=torch.float64)
        expert_mlp_reference(x.double(), tokens, segments, weights, SILU, expected)
        torch.testing.assert_close(run(x, tokens, segments, weights).double(), expected, rtol=1e-5, atol=3e-5)


def test_every_code_is_read_exactly() -> None:
    """Against torch's own float8, with the identity as the other matrices: one code per row and column."""
    for kind in ("int8", "fp8", "uint8"):
        codes = torch.arange(256, dtype=torch.uint8)
        codes = codes[(codes & 0x7F) != 0x7F] if kind == "fp8" else codes
        column = QuantizedRows(kind, codes[:, None].contiguous(), torch.ones(len(codes), 1), 1, 1)
        one = QuantizedRows("int8", torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1), 1, 1)
        row = QuantizedRows(kind, torch.zeros(1, len(codes), dtype=torch.uint8), torch.ones(1, 1), len(codes), 256)
        assert one.dequantized().item() == 1
        down_only = MLPWeights(row, row, column, torch.ones(1), torch.ones(1))
        for count in (1, 20):
            out = run(torch.zeros(1, len(codes)), torch.zeros(count, dtype=torch.int64), [(0, count)], [down_only])
            inner = torch.nn.functional.silu(torch.ones(1))
            expected = decode(kind, codes[:, None], 1)[:, 0] * inner
            torch.testing.assert_close(out, expected.expand(count, -1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_neither_company_nor_threads_nor_halves_change_bits(form: Form) -> None:
    hidden, inner = 256, 264
    weights = [make_expert(form, hidden, inner, seed=i) for i in range(len(COUNTS))]
    x, tokens, segments = torch.randn(64, hidden), torch.randint(64, (sum(COUNTS),)), segments_of(COUNTS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = run(x, tokens, segments, weights)
        torch.set_num_threads(3)
        assert torch.equal(run(x, tokens, segments, weights), together)
    finally:
        torch.set_num_threads(before)
    for segment, expert in zip(segments, weights, strict=True):
        assert torch.equal(run(x, tokens, [segment], [expert])[slice(*segment)], together[slice(*segment)])
        halves = torch.empty_like(together)
        finish_expert_mlp(start_expert_mlp(x, tokens, segment, expert, SILU), halves)
        assert torch.equal(halves[slice(*segment)], together[slice(*segment)])


def misaligned(rows: Matrix) -> QuantizedRows:
    """A copy one byte behind an aligned address, with gaps between the rows."""
    assert isinstance(rows, QuantizedRows)
    size = rows.codes.shape[1]
    codes = torch.empty(rows.codes.shape[0] * (size + 3) + 1, dtype=torch.uint8)[1:].view(-1, size + 3)[:, :size]
    codes.copy_(rows.codes)
    zeros = None if rows.zeros is None else torch.cat([rows.zeros, rows.zeros], 1)[:, : rows.num_groups]
    scales = rows.scales.repeat(1, 2)[:, : rows.num_groups]
    return replace(rows, codes=codes, scales=scales, zeros=zeros)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("count", [2, 30])
def test_addresses_and_strides_do_not_change_bits(form: Form, count: int) -> None:
    expert = make_expert(form, 128, 136)
    moved = MLPWeights(misaligned(expert.gate), misaligned(expert.up), misaligned(expert.down))
    x, tokens = torch.randn(8, 128), torch.randint(8, (count,))
    assert torch.equal(run(x, tokens, [(0, count)], [expert]), run(x, tokens, [(0, count)], [moved]))


def test_a_dequantised_matrix_is_what_its_parts_say() -> None:
    rows = QuantizedRows(
        "int4",
        torch.tensor([[0x21, 0x43], [0x0F, 0xF0]], dtype=torch.uint8),
        torch.tensor([[0.5, 2.0], [1.0, 0.25]]),
        columns=4,
        group=2,
        zeros=torch.tensor([[1, 4], [8, 0]], dtype=torch.uint8),
    )
    assert rows.dequantized().tolist() == [[0.0, 0.5, -2.0, 0.0], [7.0, -8.0, 0.0, 3.75]]


def test_groups_that_cut_words_are_not_readable() -> None:
    generator = torch.Generator().manual_seed(0)
    for form, readable in [
        (Form("int4", 16), True),
        (Form("int4", 12), False),
        (Form("int8", 32), False),
        (Form("int8", 64), True),
        (Form("int8"), True),
    ]:
        assert are_readable([make_matrix(form, 8, 192, generator)]) is readable


def test_mixed_kinds_are_refused() -> None:
    four, eight = make_expert(Form("int4", 32), 64, 64), make_expert(Form("int8"), 64, 64)
    with pytest.raises(AssertionError):
        MLPWeights(four.gate, four.up, eight.down)
