"""A whole layer in one call against its definition in float64, and its bits against experts run one call at a time."""

from __future__ import annotations

import pytest
import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_layer import ExpertLayer, combine
from moe_serve_kernels.cpu.expert_mlp import Activation, expert_mlp
from tests.kernels.quantized_experts import FORMS, Form, make_expert
from tests.support.cpu_references import expert_layer_reference

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
SILU = Activation("silu")
HIDDEN, INNER, EXPERTS = 128, 96, 9


def layer(form: Form = FORMS[0]) -> ExpertLayer:
    return ExpertLayer([make_expert(form, HIDDEN, INNER, seed) for seed in range(EXPERTS)])


def routes(num_tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(num_tokens)])
    return torch.randn(num_tokens, HIDDEN), ids, torch.rand(num_tokens, top_k)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 60, 300])
@pytest.mark.parametrize("top_k", [1, 4, EXPERTS])
def test_matches_float64(num_tokens: int, top_k: int) -> None:
    x, ids, weights = routes(num_tokens, top_k)
    tested = layer()
    out, counts = tested.run(x, ids, weights, SILU)
    assert counts == torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
    expected = expert_layer_reference(x.double(), ids, weights.double(), tested.experts, SILU)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_call_has_the_bits_of_several(form: Form) -> None:
    x, ids, weights = routes(11, 3)
    tested = layer(form)
    pairs = torch.empty(ids.numel(), HIDDEN)
    for expert in range(EXPERTS):
        places = (ids.flatten() == expert).nonzero()[:, 0]
        if len(places):
            out = torch.empty(len(places), HIDDEN)
            expert_mlp(x, places // 3, [(0, len(places))], [tested.experts[expert]], SILU, out)
            pairs[places] = out
    assert torch.equal(tested.run(x, ids, weights, SILU)[0], combine(pairs, weights))


def test_no_tokens() -> None:
    ids = torch.empty(0, 2, dtype=torch.int64)
    out, counts = layer().run(torch.empty(0, HIDDEN), ids, torch.empty(0, 2), SILU)
    assert out.shape == (0, HIDDEN)
    assert counts == [0] * EXPERTS


@pytest.mark.parametrize(("num_tokens", "top_k", "hidden"), [(1, 2, 64), (5, 8, 37), (700, 4, 100)])
def test_combine(num_tokens: int, top_k: int, hidden: int) -> None:
    pairs, weights = torch.randn(num_tokens * top_k, hidden), torch.rand(num_tokens, top_k)
    expected = (pairs.double().view(num_tokens, top_k, hidden) * weights[..., None]).sum(1)
    torch.testing.assert_close(combine(pairs, weights).double(), expected, rtol=0, atol=1e-5)
