"""Top-k routing against the torch reference, in the order and the weights of every supported family."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from moe_serve_kernels.gpu.routing import route
from moe_serve_kernels.routings import Routing
from tests.support.cpu_references import route_reference

ROUTINGS = {
    "mixtral": Routing(2, "softmax_of_chosen"),
    "olmoe": Routing(8, "softmax"),
    "qwen3": Routing(4, "softmax", renormalize=True),
    "deepseek_v2_lite": Routing(3, "softmax", scaling=16.0),
    "deepseek_v2": Routing(3, "softmax", scaling=16.0, num_groups=4, top_groups=2, best_of_group=1),
    "deepseek_v3": Routing(4, "sigmoid", renormalize=True, scaling=2.5, num_groups=4, top_groups=2),
    "glm4": Routing(3, "sigmoid", renormalize=True),
    "one": Routing(1, "softmax_of_chosen"),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(device: torch.device, name: str, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 24, device=device).to(dtype)
    bias = torch.randn(24, device=device) if ROUTINGS[name].score == "sigmoid" else None
    got, expected = route(logits, ROUTINGS[name], bias), route_reference(logits, ROUTINGS[name], bias)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROUTINGS)
def test_equal_scores_give_the_smaller_expert(device: torch.device, name: str) -> None:
    got, _ = route(torch.zeros(2, 16, device=device), ROUTINGS[name])
    assert got.tolist() == [list(range(ROUTINGS[name].top_k))] * 2


@pytest.mark.parametrize(("best_of_group", "chosen"), [(1, [3, 4, 5]), (2, [0, 1, 2])])
def test_a_group_is_worth_its_best(device: torch.device, best_of_group: Literal[1, 2], chosen: list[int]) -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0, 1.2, -2.0, -3.0]], device=device)
    routing = Routing(3, "softmax", num_groups=2, best_of_group=best_of_group)
    ids, weights = route(logits, routing)
    assert ids.tolist() == [chosen]
    torch.testing.assert_close(weights, logits.softmax(-1)[:, chosen])


def test_every_expert_chosen(device: torch.device) -> None:
    ids, weights = route(torch.randn(3, 5, device=device), Routing(5, "softmax"))
    assert ids.sort().values.tolist() == [[0, 1, 2, 3, 4]] * 3
    torch.testing.assert_close(weights.sum(1), torch.ones(3, device=device))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy of NaN, in the interpreter
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_without_numbers_there_are_still_different_experts(device: torch.device, name: str, value: float) -> None:
    """One out of range would be memory that is not ours."""
    logits = torch.full((2, 24), value, device=device)
    logits[1, 5] = 1.0
    ids, _ = route(logits, ROUTINGS[name], torch.zeros(24, device=device))
    assert ids.min() >= 0
    assert ids.max() < 24
    assert all(len(set(chosen)) == ROUTINGS[name].top_k for chosen in ids.tolist())


def test_no_tokens(device: torch.device) -> None:
    ids, weights = route(torch.empty(0, 8, device=device), Routing(2, "softmax"))
    assert ids.shape == weights.shape == (0, 2)


def test_huge_logits_do_not_overflow(device: torch.device) -> None:
    logits = torch.tensor([[1e4, -1e4, 9.9e3, 0.0]], device=device)
    for name in ("mixtral", "qwen3"):
        routing = Routing(2, ROUTINGS[name].score, ROUTINGS[name].renormalize)
        torch.testing.assert_close(route(logits, routing)[1], torch.tensor([[1.0, 0.0]], device=device))
