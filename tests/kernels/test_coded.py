"""bf16 in 12-bit codes: every bit comes back, and the kernels compute from codes what they compute from the weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.coded import CodedRows, encode, row_bytes
from moe_serve_kernels.cpu.expert_mlp import (
    Activation,
    Matrix,
    MLPWeights,
    are_readable,
    expert_mlp,
    finish_expert_mlp,
    start_expert_mlp,
)

SILU = Activation("silu")
COUNTS = (1, 2, 5, 6, 7, 16, 17, 40)
"""Tokens: every row-streaming tile, the blocked kernel, one and several tiles of AMX."""
needs_kernels = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")


def bits_of(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.view(torch.int16)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()


def of_words(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def coded(matrix: torch.Tensor) -> CodedRows:
    rows = encode(matrix)
    assert rows is not None
    return rows


def with_rare(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Every kind of bf16 among normally distributed weights: NaNs, infinities, subnormals, both zeros."""
    weights, random = normal(rows, columns, seed), np.random.default_rng(seed)
    places = random.choice(rows * columns, rows * columns // 50, replace=False)
    weights.view(-1)[places] = of_words(random.integers(0, 1 << 16, len(places)))
    return weights


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 700),
    seed=st.integers(0, 1 << 30),
    share=st.sampled_from([0, 50, 3]),
)
def test_every_bit_comes_back(rows: int, columns: int, seed: int, share: int) -> None:
    weights, random = normal(rows, columns, seed), np.random.default_rng(seed)
    if share:
        places = random.choice(rows * columns, rows * columns // share, replace=False)
        weights.view(-1)[places] = of_words(random.integers(0, 1 << 16, len(places)))
    found = encode(weights)
    if found is None:
        return
    assert found.num_bytes < weights.nbytes
    assert found.damage() is None
    assert torch.equal(bits_of(found.decoded()), bits_of(weights))


def test_every_pattern_of_bits_comes_back() -> None:
    patterns = of_words(np.arange(1 << 16)).view(256, 256)
    weights = torch.cat([normal(256, 2048), patterns], dim=1)
    assert torch.equal(bits_of(coded(weights).decoded()), bits_of(weights))


@pytest.mark.parametrize("word", [0, 0x8000, 0x7FC1, 0xFF80, 0x0001])
def test_a_matrix_of_one_value(word: int) -> None:
    weights = of_words(np.full((16, 256), word))
    assert torch.equal(bits_of(coded(weights).decoded()), bits_of(weights))


def test_what_would_take_more_memory_stays_as_it_is() -> None:
    assert encode(of_words(np.arange(1 << 16)).view(256, 256)) is None
    assert encode(normal(64, 32)) is None


def test_a_usual_matrix_takes_three_quarters() -> None:
    weights = normal(768, 2048)
    assert coded(weights).num_bytes < 0.753 * weights.nbytes
    assert row_bytes(2048) == 3072


def test_what_no_encoder_writes_is_told() -> None:
    good = coded(with_rare(8, 256, 1))
    starts, entries = good.rare[:9], good.rare[9:]
    assert len(entries)

    def told(starts: torch.Tensor = starts, entries: torch.Tensor = entries, last: int = 0) -> str:
        exponents = torch.cat([good.exponents[:15], torch.tensor([last], dtype=torch.uint8)])
        damage = CodedRows(good.codes, exponents, torch.cat([starts, entries]), 256).damage()
        assert damage is not None
        return damage

    swapped = starts.clone()
    swapped[1] = starts[-1] + 1
    assert "out of order" in told(swapped)
    assert "names others" in told(starts + 1)
    assert "names others" in told(starts[:5], entries[:0])
    assert "behind the last of 256 columns" in told(entries=entries | 300 << 16)
    assert "no end" in told(last=3)


def run(x: torch.Tensor, segments: list[tuple[int, int]], weights: list[MLPWeights]) -> torch.Tensor:
    out = torch.zeros(segments[-1][1], x.shape[1])
    expert_mlp(x, torch.arange(segments[-1][1]) % len(x), segments, weights, SILU, out)
    return out


def expert_of(matrices: Sequence[Matrix], rounds: bool = False) -> MLPWeights:
    gate, up, down = matrices
    return MLPWeights(gate, up, down, rounds=rounds)


def pairs_of(hidden: int, inner: int, rounds: bool, rare: bool) -> list[tuple[MLPWeights, MLPWeights]]:
    """Experts in plain rows, and the same ones in codes."""
    found = []
    for seed in range(len(COUNTS)):
        sizes = [(inner, hidden), (inner, hidden), (hidden, inner)]
        plain = [normal(*size, seed=10 * seed + i) for i, size in enumerate(sizes)]
        for matrix in plain if rare else ():
            matrix.view(-1)[seed :: matrix.numel() // 40] = 1e-30
            matrix[0, -1] = 3e4
        codes: list[Matrix] = [matrix if (rows := encode(matrix)) is None else rows for matrix in plain]
        assert any(isinstance(matrix, CodedRows) for matrix in codes)
        found.append((expert_of(plain, rounds), expert_of(codes, rounds)))
    return found


@needs_kernels
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(256, 384), (1280, 200), (136, 1152), (2304, 128)])
def test_the_bits_are_those_of_the_plain_kernel(hidden: int, inner: int, rare: bool, rounds: bool) -> None:
    experts = pairs_of(hidden, inner, rounds, rare)
    x = torch.randn(40, hidden, generator=torch.Generator().manual_seed(hidden))
    segments = list(pairwise(accumulate(COUNTS, initial=0)))
    plain = run(x, segments, [expert for expert, _ in experts])
    assert torch.equal(run(x, segments, [expert for _, expert in experts]), plain)
    assert plain.isfinite().all()
    assert plain.std() > 0
    for segment, (_, expert) in zip(segments, experts, strict=True):
        halves = torch.empty_like(plain)
        tokens = torch.arange(len(plain)) % len(x)
        finish_expert_mlp(start_expert_mlp(x, tokens, segment, expert, SILU), halves)
        assert torch.equal(halves[slice(*segment)], plain[slice(*segment)])


@needs_kernels
@pytest.mark.parametrize("count", [1, 9])
def test_codes_are_read_at_any_address(count: int) -> None:
    plain = [normal(*size, seed=size[0]) for size in ((200, 256), (200, 256), (256, 200))]

    def moved(matrix: torch.Tensor) -> CodedRows:
        rows = coded(matrix)
        size = rows.codes.shape[1]
        codes = torch.empty(len(rows.codes) * (size + 3) + 1, dtype=torch.uint8)[1:].view(-1, size + 3)[:, :size]
        return CodedRows(codes.copy_(rows.codes), rows.exponents, rows.rare, rows.columns)

    matrices = [moved(matrix) for matrix in plain]
    assert are_readable(matrices)
    x = torch.randn(count, 256)
    segments = [(0, count)]
    assert torch.equal(run(x, segments, [expert_of(matrices)]), run(x, segments, [expert_of(plain)]))


@needs_kernels
def test_a_damaged_list_writes_nowhere_else() -> None:
    """A checksum finds the damage later than the first product starts."""
    plain = [normal(*size, seed=size[0]) for size in ((128, 256), (128, 256), (256, 128))]
    random = np.random.default_rng(5)
    for _ in range(20):
        codes = [coded(matrix) for matrix in plain]
        for rows in codes:
            rows.rare[:] = torch.from_numpy(random.integers(-(1 << 31), 1 << 31, len(rows.rare)).astype(np.int32))
            rows.rare[: len(rows.codes)] %= 1 << int(random.integers(1, 20))
        for count in (1, 20):
            run(torch.randn(count, 256), [(0, count)], [expert_of(codes)])
