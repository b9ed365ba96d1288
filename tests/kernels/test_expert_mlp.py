"""expert_mlp against its reference, and what it promises about bits: odd sizes, every kind of weight, any company."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_mlp import (
    KINDS,
    Activation,
    Kind,
    Matrix,
    MLPWeights,
    expert_mlp,
    has_function,
    is_available,
)
from tests.support.cpu_references import expert_mlp_reference

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

SILU = Activation("silu")
SENTINEL = 77.0
COUNTS = [1, 2, 3, 5, 6, 7, 11, 16, 17, 29, 33, 70, 300]
"""Tokens of a segment: every row-streaming tile, one and several tiles of the blocked kernel."""


def make(
    hidden: int, inner: int, dtype: torch.dtype = torch.float32, biases: torch.dtype | None = None, seed: int = 0
) -> MLPWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
        return drawn.to(dtype)

    matrices = (matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner))
    if biases is None:
        return MLPWeights(*matrices)
    return MLPWeights(*matrices, *(torch.randn(n, generator=generator).to(biases) for n in (inner, inner, hidden)))


def segments_of(counts: list[int]) -> list[tuple[int, int]]:
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return list(pairwise(ends))


def plain(matrix: Matrix) -> torch.Tensor:
    """A matrix that is not quantised."""
    assert isinstance(matrix, torch.Tensor)
    return matrix


def run(
    x: torch.Tensor,
    tokens: torch.Tensor,
    segments: list[tuple[int, int]],
    weights: list[MLPWeights],
    activation: Activation = SILU,
) -> torch.Tensor:
    out = torch.full((len(tokens), x.shape[1]), SENTINEL)
    expert_mlp(x, tokens, segments, weights, activation, out)
    return out


def reference(
    x: torch.Tensor,
    tokens: torch.Tensor,
    segments: list[tuple[int, int]],
    weights: list[MLPWeights],
    activation: Activation = SILU,
) -> torch.Tensor:
    out = torch.full((len(tokens), x.shape[1]), SENTINEL, dtype=torch.float64)
    expert_mlp_reference(x.double(), tokens, segments, weights, activation, out)
    return out


def check(
    x: torch.Tensor,
    tokens: torch.Tensor,
    segments: list[tuple[int, int]],
    weights: list[MLPWeights],
    activation: Activation = SILU,
) -> None:
    got, expected = run(x, tokens, segments, weights, activation), reference(x, tokens, segments, weights, activation)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 128), (37, 50), (1, 1), (300, 33), (70, 290), (96, 65), (15, 17)])
def test_every_token_count_and_odd_widths(dtype: torch.dtype, hidden: int, inner: int) -> None:
    torch.manual_seed(hidden)
    weights = [make(hidden, inner, dtype, seed=i) for i in range(len(COUNTS))]
    x, tokens = torch.randn(40, hidden), torch.randint(40, (sum(COUNTS),))
    check(x, tokens, segments_of(COUNTS), weights)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if has_function(Activation(kind))])
@pytest.mark.parametrize("biases", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 40])
def test_activations_and_biases(kind: Kind, biases: torch.dtype | None, count: int) -> None:
    torch.manual_seed(count)
    x, tokens = torch.randn(50, 48) * 6, torch.randperm(50)[:count]
    check(x, tokens, [(0, count)], [make(48, 70, torch.bfloat16, biases)], Activation(kind, alpha=1.3, limit=2.0))


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_rows_and_biases(count: int, dtype: torch.dtype) -> None:
    gate_up, biases = torch.randn(2 * 50, 60).to(dtype), torch.randn(100).to(dtype)
    down = torch.randn(50, 90)[:, 3:53].to(dtype)
    weights = MLPWeights(gate_up[::2, 5:55], gate_up[1::2, 5:55], down, biases[::2], biases[1::2], biases[7:57])
    x = torch.randn(count, 50) / 50
    check(x, torch.arange(count), [(0, count)], [weights])


def test_rows_outside_the_segments_are_not_touched() -> None:
    x, tokens = torch.randn(4, 40), torch.arange(60) % 4
    got = run(x, tokens, [(3, 5), (10, 10), (20, 55)], [make(40, 24, seed=i) for i in range(3)])
    inside = torch.zeros(60, dtype=torch.bool)
    inside[3:5] = inside[20:55] = True
    assert (got[~inside] == SENTINEL).all()
    assert (got[inside] != SENTINEL).all()


def test_no_segments() -> None:
    out = torch.full((2, 8), SENTINEL)
    expert_mlp(torch.randn(2, 8), torch.arange(2), [], [], SILU, out)
    assert (out == SENTINEL).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_does_not_change_bits(dtype: torch.dtype) -> None:
    weights = [make(90, 130, dtype, torch.float32, seed=i) for i in range(len(COUNTS))]
    x, tokens, segments = torch.randn(64, 90), torch.randint(64, (sum(COUNTS),)), segments_of(COUNTS)
    together = run(x, tokens, segments, weights)
    for segment, expert in zip(segments, weights, strict=True):
        alone = run(x, tokens, [segment], [expert])
        assert torch.equal(alone[slice(*segment)], together[slice(*segment)])


def misaligned(matrix: torch.Tensor) -> torch.Tensor:
    """A copy that starts one element behind an aligned address."""
    copy = torch.empty(matrix.numel() + 1, dtype=matrix.dtype)[1:].view_as(matrix)
    return copy.copy_(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_addresses_do_not_change_bits(dtype: torch.dtype, count: int) -> None:
    weights = make(90, 130, dtype)
    moved = MLPWeights(*(misaligned(plain(m)) for m in (weights.gate, weights.up, weights.down)))
    x, tokens = torch.randn(64, 90), torch.randint(64, (count,))
    expected = run(x, tokens, [(0, count)], [weights])
    assert torch.equal(run(x, tokens, [(0, count)], [moved]), expected)
    assert torch.equal(run(misaligned(x), tokens, [(0, count)], [weights]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    weights = [make(256, 300, dtype, seed=i) for i in range(len(COUNTS))]
    x, tokens, segments = torch.randn(64, 256), torch.randint(64, (sum(COUNTS),)), segments_of(COUNTS)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(run(x, tokens, segments, weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count", [2, 40])
def test_broken_weights_stay_in_their_segment(value: float, count: int) -> None:
    weights = [make(40, 50, seed=i) for i in range(3)]
    x, tokens, segments = torch.randn(9, 40), torch.randint(9, (3 * count,)), segments_of([count] * 3)
    expected = run(x, tokens, segments, weights)
    plain(weights[1].gate).fill_(value)
    plain(weights[1].down).fill_(value)
    got = run(x, tokens, segments, weights)
    assert not got[count : 2 * count].isfinite().any()
    assert torch.equal(got[:count], expected[:count])
    assert torch.equal(got[2 * count :], expected[2 * count :])


@pytest.mark.parametrize("count", [2, 40])
def test_a_broken_token_stays_alone(count: int) -> None:
    x, weights = torch.randn(count, 40), make(40, 50)
    expected = run(x, torch.arange(count), [(0, count)], [weights])
    x[1, 3] = float("nan")
    got = run(x, torch.arange(count), [(0, count)], [weights])
    assert got[1].isnan().all()
    others = torch.arange(count) != 1
    assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "clamped_swiglu"])
def test_large_activations_stay_finite(kind: Kind) -> None:
    x, weights = torch.full((1, 4), 200.0), MLPWeights(torch.eye(4), torch.eye(4), torch.eye(4))
    gate = plain(weights.gate)
    gate[0, 0] = gate[1, 1] = -1
    check(x, torch.zeros(1, dtype=torch.int64), [(0, 1)], [weights], Activation(kind))


def test_is_offered_for_float32_activations_on_cpu_only() -> None:
    cpu = torch.device("cpu")
    assert is_available(cpu, "bfloat16", torch.float32)
    assert is_available(cpu, "float32", torch.float32)
    assert not is_available(cpu, "bfloat16", torch.bfloat16)
    assert is_available(cpu, "float16", torch.float32)
    assert not is_available(cpu, "float64", torch.float32)
    assert not is_available(torch.device("meta"), "float32", torch.float32)


def test_columns_are_refused() -> None:
    with pytest.raises(AssertionError):
        MLPWeights(torch.randn(8, 6).t(), torch.randn(8, 6).t(), torch.randn(8, 6))
