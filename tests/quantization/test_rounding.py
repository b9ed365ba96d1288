"""Rounding: how large the error can be, and that the search lowers the one it is to lower."""

from __future__ import annotations

import pytest
import torch

from moe_serve.quantization.rounding import round_matrix


def weights(seed: int = 0, rows: int = 24, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 16


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (4, 0), (8, 0), (8, 64)])
def test_no_weight_moves_further_than_half_a_step(bits: int, group: int) -> None:
    w = weights()
    rounded = round_matrix(w, bits, group)
    assert tuple(rounded.scales.shape) == (24, 256 // (group or 256))
    # The stored scale is rounded to bf16, which can leave the largest weight a little outside.
    steps = rounded.scales.float().repeat_interleave(group or 256, 1)
    limit = steps * (0.5 + 2.0**-8 * 2 ** (bits - 1) + 1e-3)
    assert ((rounded.matrix() - w).abs() <= limit).all()
    assert rounded.codes.min() >= -(2 ** (bits - 1))
    assert rounded.codes.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_lowers_the_error_of_the_outputs(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 256, generator=generator) * torch.rand(256, generator=generator).pow(4) * 10
    w = weights()
    importance = x.square().mean(0)
    plain, searched = round_matrix(w, bits, 128), round_matrix(w, bits, 128, importance)
    errors = [(x @ (r.matrix() - w).t()).square().mean() for r in (plain, searched)]
    assert errors[1] < (0.8 if bits == 4 else 1.0) * errors[0]


def test_uniform_importance_is_never_worse_than_rounding() -> None:
    w = weights(2)
    plain, searched = round_matrix(w, 4, 64), round_matrix(w, 4, 64, torch.ones(256))
    errors = [(r.matrix() - w).view(24, -1, 64).square().sum(2) for r in (plain, searched)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


def test_zeros_stay_zeros() -> None:
    for importance in (None, torch.ones(64), torch.zeros(64)):
        rounded = round_matrix(torch.zeros(4, 64), 4, 32, importance)
        assert (rounded.matrix() == 0).all()
        assert rounded.scales.isfinite().all()
