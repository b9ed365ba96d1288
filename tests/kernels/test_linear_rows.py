"""linear_rows against its reference: odd widths, every token block, strided weights and outputs."""

from __future__ import annotations

import pytest
import torch

from moe_serve_kernels.cpu import library, linear_rows

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 9, 15, 21])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 50), (130, 32), (65, 63), (64, 768), (3, 95)])
def test_matches_the_reference(tokens, rows, columns) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(tokens, columns), torch.randn(rows, columns).bfloat16()
    got = linear_rows.linear_rows(x, weight)
    expected = linear_rows.linear_rows_reference(x.double(), weight)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6 * columns)


def test_writes_only_its_slice_of_a_wider_output() -> None:
    x, weight = torch.randn(5, 40), torch.randn(6, 40).bfloat16()
    out = torch.full((5, 10), 7.0)
    linear_rows.linear_rows(x, weight, out[:, 2:8])
    torch.testing.assert_close(out[:, 2:8], linear_rows.linear_rows_reference(x, weight), rtol=0, atol=1e-4)
    assert (out[:, :2] == 7).all()
    assert (out[:, 8:] == 7).all()


def test_rows_of_a_larger_matrix() -> None:
    x, weight = torch.randn(2, 33), torch.randn(9, 80).bfloat16()[::2, 5:38]
    assert linear_rows.is_available(weight, torch.float32)
    got = linear_rows.linear_rows(x, weight)
    torch.testing.assert_close(got, linear_rows.linear_rows_reference(x, weight), rtol=0, atol=1e-4)


def test_is_not_offered_where_it_cannot_read() -> None:
    weight = torch.randn(8, 16).bfloat16()
    assert not linear_rows.is_available(weight.t(), torch.float32)
    assert not linear_rows.is_available(weight, torch.bfloat16)
    assert not linear_rows.is_available(weight.float(), torch.float32)


@pytest.mark.parametrize("value", [float("inf"), 3e38, 1e-40, -0.0])
def test_extreme_values_survive_widening(value) -> None:
    x, weight = torch.ones(1, 32), torch.zeros(2, 32).bfloat16()
    weight[0, 3] = value
    assert linear_rows.linear_rows(x, weight)[0, 0].item() == weight[0, 3].float().item()
