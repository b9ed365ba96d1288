"""linear against float64: odd widths, few and many tokens, biases, strided rows, no tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.library import native
from moe_serve_kernels.cpu.linear import BlockTable, LinearTable, LinearWeights, linear, linears
from moe_serve_kernels.quantized import READABLE_BLOCKS
from tests.kernels.quantized_experts import FORMS, Form, make_matrix
from tests.kernels.test_blocks import random_rows

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 33, 255, 256, 257, 600])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 50), (130, 32), (65, 63), (64, 768), (3, 95)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(tokens, columns), torch.randn(rows, columns).to(dtype), torch.randn(rows).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, LinearWeights(weight, bias)).double(), expected, rtol=0, atol=1e-6 * columns)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_match_float64(form: Form) -> None:
    weight, x, bias = (
        make_matrix(form, 70, 384, torch.Generator().manual_seed(1)),
        torch.randn(40, 384),
        torch.randn(70),
    )
    whole = linear(x, LinearWeights(weight, bias))
    expected = F.linear(x.double(), weight.dequantized(torch.float64), bias.double())
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=1e-4)
    for count in (1, 3, 6, 7):
        assert torch.equal(linear(x[:count], LinearWeights(weight, bias)), whole[:count])


@pytest.mark.parametrize("kind", READABLE_BLOCKS)
def test_blocks_have_the_bits_of_their_floats(kind: str) -> None:
    weight, x = random_rows(kind, 70, 512, torch.Generator().manual_seed(2)), torch.randn(40, 512)
    floats = LinearWeights(weight.dequantized())
    for count in (1, 2, 3, 6, 7, 40):
        assert torch.equal(linear(x[:count], LinearWeights(weight)), linear(x[:count], floats))


@pytest.mark.parametrize("kind", READABLE_BLOCKS)
def test_rows_of_a_table_of_blocks(kind: str) -> None:
    weight, ids = random_rows(kind, 9, 768, torch.Generator().manual_seed(3)), torch.tensor([[8, 0], [3, 3]])
    assert torch.equal(BlockTable(weight).rows(ids), weight.dequantized()[ids])


def test_leading_axes_and_no_bias() -> None:
    x, weight = torch.randn(2, 3, 40), torch.randn(6, 40).bfloat16()
    got = linear(x.transpose(0, 1), LinearWeights(weight))
    torch.testing.assert_close(got, F.linear(x.transpose(0, 1), weight.float()), rtol=0, atol=1e-4)


def test_rows_of_a_larger_matrix() -> None:
    x, weight = torch.randn(2, 33), torch.randn(9, 80).bfloat16()[::2, 5:38]
    torch.testing.assert_close(linear(x, LinearWeights(weight)), F.linear(x, weight.float()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 6, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_layers_have_the_bits_of_each(tokens: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(5, tokens, 40), torch.randn(5, 70, 40).to(dtype), torch.randn(5, 70).to(dtype)
    layers = [LinearWeights(*each) for each in zip(weight, bias, strict=True)]
    expected = torch.stack([linear(rows, layer) for rows, layer in zip(x, layers, strict=True)])
    assert torch.equal(linears(x, LinearTable(layers)), expected)


def test_no_tokens() -> None:
    assert linear(torch.empty(0, 8), LinearWeights(torch.randn(3, 8))).shape == (0, 3)


def test_the_number_of_threads_changes_no_bit() -> None:
    x, weights = torch.randn(300, 512), LinearWeights(torch.randn(700, 512).bfloat16())
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(linear(x, weights))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [float("inf"), 3e38, 1e-40, -0.0])
def test_extreme_values_survive_widening(value: float) -> None:
    """Tiles take what is below 2^-126 for zero; nothing else does."""
    weight = torch.zeros(2, 32).bfloat16()
    weight[0, 3] = value
    flushes = native().isa == "amx" and value == 1e-40
    expected = 0.0 if flushes else weight[0, 3].float().item()
    assert linear(torch.ones(1, 32), LinearWeights(weight))[0, 0].item() == expected


FLOAT32 = torch.finfo(torch.float32)


@pytest.mark.parametrize("columns", [32, 40])
@pytest.mark.parametrize("value", [FLOAT32.max, -FLOAT32.max, 1 + FLOAT32.eps, 1e-30 / 3, float("inf"), -float("inf")])
def test_extreme_activations_stay_what_they_are(value: float, columns: int) -> None:
    """40 columns are no whole tile of 32: these run without tiles."""
    x = torch.zeros(1, columns)
    x[0, 3] = value
    assert linear(x, LinearWeights(torch.ones(2, columns).bfloat16())).tolist() == [[x[0, 3].item()] * 2]


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7F800001, 0x7FBFFFFF])
def test_nan_stays_nan(payload: int) -> None:
    x = torch.ones(3, 64)
    x.view(torch.int32)[1, 5] = payload
    out = linear(x, LinearWeights(torch.ones(20, 64).bfloat16()))
    assert out[1].isnan().all()
    assert (out[::2] == 64).all()


def test_bf16_weights_meet_all_bits_of_activations() -> None:
    """24 bits of mantissa: sums are as close to float64's as those of float32 weights."""
    torch.manual_seed(1)
    x, weight = torch.randn(50, 1024), torch.randn(256, 1024).bfloat16()
    exact = x.double() @ weight.double().T
    error = linear(x, LinearWeights(weight)).double().sub(exact).square().mean().sqrt()
    widened = linear(x, LinearWeights(weight.float())).double().sub(exact).square().mean().sqrt()
    assert error <= 1.1 * widened
