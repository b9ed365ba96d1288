"""When recent traffic would rather have another plan, and when not. No ranks; the search is a real process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_serve.errors import InvalidRequestError
from moe_serve.parallel.expert_plans import contiguous_plan
from moe_serve.parallel.front.plan_search import PlanSearchError, search
from moe_serve.planning.replanning import Terms, judge, lacking, propose
from moe_serve.server.endpoints.expert_plan import read_plan
from placement.cost import Layout, hosts_of
from placement.plan import PlacementPlan
from predictors.predictor import RouterShape
from predictors.trace import RoutingTrace, offsets_of

LAYERS = (1, 2, 3, 5)
SHAPE = RouterShape(LAYERS, num_experts=8, top_k=2)
TERMS = Terms(margin_frac=0.05, time_limit_s=60.0)
NUM_SEQUENCES, LENGTH = 20, 40


@pytest.fixture
def in_force() -> PlacementPlan:
    return contiguous_plan(LAYERS, 8, 2)


def traffic(structure: float, seed: int = 0) -> RoutingTrace:
    """Sequences, in pairs alike, that stay with probability `structure` among the even experts, or the odd ones."""
    rng = np.random.default_rng(seed)
    ids = np.empty((NUM_SEQUENCES, LENGTH, len(LAYERS), 2), np.int64)
    for s, t, layer in np.ndindex(ids.shape[:3]):
        among = np.arange(s // 2 % 2, 8, 2) if rng.random() < structure else np.arange(8)
        ids[s, t, layer] = rng.choice(among, 2, replace=False)
    offsets = offsets_of([LENGTH] * NUM_SEQUENCES)
    return RoutingTrace(ids.reshape(-1, len(LAYERS), 2), offsets, np.array(LAYERS), 8)


def test_structure_is_found_and_worth_it(in_force: PlacementPlan) -> None:
    candidate, verdict = propose(in_force, traffic(0.9), TERMS)
    assert verdict.adopt
    assert verdict.traffic_then < 0.3 < 0.45 < verdict.traffic_now
    device_of = candidate.layout.device_of
    assert all(len(set(device_of[layer, half::2])) == 1 for layer in range(4) for half in (0, 1))
    assert verdict.moved == (hosts_of(candidate.layout, 2) & ~hosts_of(in_force.layout, 2)).sum() == 16
    assert verdict.tokens == NUM_SEQUENCES * LENGTH // 2


def test_the_plan_in_force_is_kept_once_it_suits(in_force: PlacementPlan) -> None:
    better, _ = propose(in_force, traffic(0.9), TERMS)
    again, verdict = propose(better, traffic(0.9, seed=1), TERMS)
    assert not verdict.adopt
    assert verdict.why == "saves nothing"
    assert verdict.moved == 0, again


def test_what_noise_would_save_is_not_enough(in_force: PlacementPlan) -> None:
    _, verdict = propose(in_force, traffic(0.0), TERMS)
    assert not verdict.adopt


@pytest.mark.parametrize(("margin_frac", "adopted"), [(0.3, True), (0.9, False)])
def test_the_margin_decides(in_force: PlacementPlan, margin_frac: float, adopted: bool) -> None:
    better, _ = propose(in_force, traffic(0.9), TERMS)
    verdict = judge(in_force, better, traffic(0.9, seed=2), Terms(margin_frac, 5.0))
    assert verdict.adopt == adopted
    assert ("less than the margin of 90.0%" in verdict.why) != adopted


def test_imbalance_beyond_the_limit_is_refused() -> None:
    limited = contiguous_plan(LAYERS, 8, 2)
    limited = replace(limited, objective={**limited.objective, "max_imbalance": 1.3})
    lopsided = replace(limited, layout=Layout(np.zeros((4, 8), np.int64)), slots=np.array([8, 8]))
    verdict = judge(limited, lopsided, traffic(0.9), TERMS)
    assert not verdict.adopt
    assert verdict.traffic_then == 0
    assert "imbalance" in verdict.why


def test_too_little_traffic_says_so() -> None:
    assert "0 tokens of 0 sequences" in lacking(None)
    assert "40 tokens of 1 sequences" in lacking(traffic(0.5).select([0]))
    assert lacking(traffic(0.5)) == ""


def test_the_search_beside_serving_finds_the_same(in_force: PlacementPlan) -> None:
    here, said = propose(in_force, traffic(0.9), TERMS)
    there, verdict = asyncio.run(search(in_force, traffic(0.9), TERMS))
    assert verdict == said
    assert np.array_equal(there.layout.device_of, here.layout.device_of)
    _, judged = asyncio.run(search(in_force, traffic(0.9), TERMS, in_force))
    assert (judged.adopt, judged.moved) == (False, 0)


def test_a_search_that_fails_says_why(in_force: PlacementPlan) -> None:
    other = replace(in_force, layout=Layout(in_force.layout.device_of[:2]))
    with pytest.raises(PlanSearchError, match="num_layers"):
        asyncio.run(search(other, traffic(0.9), TERMS))


def changed(plan: PlacementPlan, **changes: Any) -> dict[str, Any]:
    return {**plan.to_json(), **changes}


def test_a_given_plan_that_fits(in_force: PlacementPlan) -> None:
    found = read_plan(changed(in_force), SHAPE, 2)
    assert np.array_equal(found.layout.device_of, in_force.layout.device_of)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format": "other"}, "plan.format"),
        ({"version": 9}, "plan.version"),
        ({"num_layers": 2}, "plan.device_of"),
        ({"num_layers": 0, "device_of": []}, "plan.device_of"),
        ({"num_experts": 0, "device_of": [[]] * 4}, "plan.device_of"),
        ({"device_of": [[0, 7] * 4] * 4}, "plan.device_of"),
        ({"device_of": [[0] * 8] * 4}, "plan.slots"),
        ({"device_of": "x"}, "plan.device_of"),
        ({"replicas": [[0, 0, 0]]}, "plan.replicas"),
        ({"lower_bound": float("nan")}, "plan.lower_bound"),
        ({"objective": {"max_imbalance": "much"}}, "plan.objective"),
        ({"objective": {"choices": "none"}}, "plan.objective"),
        ({"objective": {"expert_bytes": float("inf")}}, "plan.objective"),
        ({"provenance": {"layer_ids": [0, 1, 2, 3]}}, "plan.layer_ids"),
        ({"provenance": {"layer_ids": 7}}, "plan.layer_ids"),
    ],
)
def test_a_bad_plan_is_refused_by_field(in_force: PlacementPlan, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        read_plan(changed(in_force, **changes), SHAPE, 2)
    assert refusal.value.param == field
    assert field in refusal.value.message


def test_a_plan_for_other_ranks_is_refused(in_force: PlacementPlan) -> None:
    with pytest.raises(InvalidRequestError, match=r"plan\.num_devices: is 2, but this model on --devices 3 has 3"):
        read_plan(changed(in_force), SHAPE, 3)
