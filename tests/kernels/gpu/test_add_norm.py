"""The residual stream's sum and norm, and a dense MLP's activation, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from moe_serve_kernels.cpu.expert_mlp import Activation, activate
from moe_serve_kernels.gpu.add_norm import Added, add_norm
from moe_serve_kernels.gpu.mlp_activation import mlp_activation

TOKENS, HIDDEN = 3, 40
EPS = 1e-5


def expected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("parts", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_sum_and_norm(device: torch.device, parts: int, dtype: torch.dtype, tolerance: float) -> None:
    x, first, second = (torch.randn(TOKENS, HIDDEN, device=device).to(dtype) for _ in range(3))
    weight, gate = torch.randn(HIDDEN, device=device).to(dtype), torch.randn(TOKENS, 1, device=device).to(dtype)
    wide = torch.empty(TOKENS, HIDDEN, device=device)
    total = x.double()
    if parts:
        total = total + 0.5 * first.double()
    if parts > 1:
        total = total + 0.5 * second.double() * (gate.double().sigmoid() if parts == 3 else 1.0)
    added = Added(*(first, second, gate)[:parts])
    out = add_norm(x, weight, EPS, added, scale=0.5, wide=wide)
    torch.testing.assert_close(x.double(), total, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.double(), expected(x, weight), rtol=tolerance, atol=tolerance)
    assert torch.equal(wide, out.float())


def test_the_beginnings_of_longer_rows(device: torch.device) -> None:
    rows = torch.randn(TOKENS, 2 * HIDDEN, device=device)
    weight = torch.randn(HIDDEN, device=device)
    before = rows.clone()
    out = add_norm(rows[:, :HIDDEN], weight, EPS)
    torch.testing.assert_close(out.double(), expected(before[:, :HIDDEN], weight), rtol=1e-6, atol=2e-6)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activation(device: torch.device, kind: str) -> None:
    activation = Activation(kind)  # type: ignore[arg-type]
    gate_up = torch.randn(TOKENS, 2 * HIDDEN, device=device)
    gate, up = gate_up.double().chunk(2, -1)
    got = mlp_activation(gate_up, activation.kind, activation.alpha, activation.limit)
    torch.testing.assert_close(got.double(), activate(activation, gate, up), rtol=1e-6, atol=2e-6)
