"""Each mistake raises an error that opens with the field and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import PlacementError
from placement.plan import load_plan, save_plan
from placement.problem import PlacementProblem, count_transitions
from placement.solve import find_plan
from placement.topology import Topology

LOAD = np.ones((3, 4))
STEPS = np.ones((2, 4, 4))


def with_nan(array: Any) -> Any:
    return np.where(np.arange(array.size).reshape(array.shape) == 5, np.nan, array)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "NaN load": ({"load": with_nan(LOAD)}, r"^load: has nan at \[1, 1\]; drop or repair"),
    "negative load": ({"load": -LOAD}, r"^load: has negative entries"),
    "flat load": ({"load": np.ones(4)}, r"^load: needs 2 axes"),
    "ragged load": ({"load": [[1, 2], [3]]}, r"^load: needs numbers in a regular array"),
    "silent layer": ({"load": np.array([[1.0] * 4, [0.0] * 4, [1.0] * 4])}, r"^load: layer 1 has no load"),
    "infinite step": ({"transitions": np.full((2, 4, 4), np.inf)}, r"^transitions: has inf"),
    "steps of other size": ({"transitions": np.ones((3, 4, 4))}, r"^transitions: needs shape \(2, 4, 4\)"),
    "too few slots": ({"slots": np.array([1, 2])}, r"^slots: 3 slots for 4 experts of a layer; add devices or memory"),
    "slots of other size": ({"slots": np.array([4])}, r"^slots: needs 2 counts"),
    "too little memory": (
        {"topology": Topology.even(2, memory_bytes=3), "expert_bytes": 1},
        r"^memory_bytes: 2 experts of a layer fit, but there are 4",
    ),
    "slots over memory": (
        {"topology": Topology.even(2, memory_bytes=6), "spare_slots": 1, "slots": np.array([2, 2])},
        r"^memory_bytes: too small",
    ),
    "limit below fair": ({"max_imbalance": 0.9}, r"^max_imbalance: needs at least 1"),
    "NaN limit": ({"max_imbalance": float("nan")}, r"^max_imbalance: needs at least 1"),
    "negative price": ({"balance_price": -1.0}, r"^balance_price: needs a number of at least 0"),
    "NaN price": ({"migration_price": float("nan")}, r"^migration_price: needs a number"),
    "no expert size": ({"expert_bytes": 0}, r"^expert_bytes: needs at least 1"),
    "negative room": ({"spare_slots": -1}, r"^spare_slots: needs at least 0"),
    "pin to no device": ({"pinned": np.full((3, 4), 2)}, r"^pinned: needs devices 0..1"),
    "too many pins": ({"pinned": np.zeros((3, 4), int)}, r"^pinned: more experts of one layer than device 0 has slots"),
    "pins of other size": ({"pinned": np.zeros((3, 3), int)}, r"^pinned: needs integers of shape \(3, 4\)"),
    "current nowhere": ({"current": np.full((3, 4), -1)}, r"^current: needs devices 0..1, got -1"),
    "unknown routing": ({"replica_routing": "random"}, r"^replica_routing: must be one of nearest, even"),
    "unknown choices": ({"choices": "top2"}, r"^choices: must be one of all, top1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_problem_names_its_field(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(PlacementError, match=message):
        PlacementProblem(**{"load": LOAD, "transitions": STEPS, "topology": Topology.even(2), **changes})


TOPOLOGIES: dict[str, tuple[dict[str, Any], str]] = {
    "no device": ({"node_of": np.zeros(0, int)}, r"^node_of: needs one node per device"),
    "gap in nodes": ({"node_of": np.array([0, 2])}, r"^node_of: number the nodes"),
    "speeds of other size": ({"node_of": np.array([0, 0]), "speed": np.ones(3)}, r"^speed: needs 2 values"),
    "no speed": ({"node_of": np.array([0, 0]), "speed": np.zeros(2)}, r"^speed: needs positive numbers"),
    "cheap nodes": ({"node_of": np.array([0, 0]), "node_hop_cost": 0.5}, r"^node_hop_cost: needs 0 <= gpu_hop_cost"),
}


@pytest.mark.parametrize("case", TOPOLOGIES)
def test_a_wrong_topology_names_its_field(case: str) -> None:
    given, message = TOPOLOGIES[case]
    with pytest.raises(PlacementError, match=message):
        Topology(**given)


def test_even_topologies_check_their_numbers() -> None:
    with pytest.raises(PlacementError, match=r"^gpus: needs at least 1"):
        Topology.even(0)
    with pytest.raises(PlacementError, match=r"^gpus_per_node: must divide the 8 devices"):
        Topology.even(8, 3)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 3)), r"^ids: needs integers \[tokens, layers, choices\]"),
        (np.full((2, 3, 1), 9), r"^ids: needs experts 0..3, got 9..9"),
    ],
)
def test_wrong_routes_are_named(ids: Any, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        count_transitions(ids, 4)


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    save_plan(find_plan(PlacementProblem(LOAD, STEPS, Topology.even(2), spare_slots=1), "auto", effort=2), path)
    return path


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "other format": ({"format": "x"}, r"^format: is not 'moe-serve-placement'"),
    "other version": ({"version": 99}, r"^version: is 99, this program reads 1"),
    "no solver": ({"solver": None}, r"^solver: needs a str"),
    "flat devices": ({"device_of": [0, 1]}, r"^device_of: needs integers of shape \(3, 4\)"),
    "ragged devices": ({"device_of": [[0], [1, 2]]}, r"^device_of: needs integers"),
    "device 7": ({"device_of": [[0, 0, 1, 7]] * 3}, r"^device_of: needs devices 0..1"),
    "crowded device": ({"device_of": [[0, 0, 0, 1]] * 3}, r"^slots: layer 0 has 3 experts on device 0, which holds 2"),
    "cost without traffic": ({"cost": {"total": 0.5}}, r"^traffic: needs a float"),
    "copy of nothing": ({"replicas": [[9, 0, 0]]}, r"^replicas: rows are layer, expert, device"),
    "copy in place": ({"device_of": [[0, 0, 1, 1]] * 3, "replicas": [[0, 0, 0]]}, r"^replicas: the same copy"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_plan_names_its_field(plan_file: Path, case: str) -> None:
    change, message = DAMAGE[case]
    plan_file.write_text(json.dumps({**json.loads(plan_file.read_text()), **change}))
    with pytest.raises(PlacementError, match=message):
        load_plan(plan_file)


def test_a_truncated_plan_is_named(plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text()[:100])
    with pytest.raises(PlacementError, match=r"^plan: cannot read .*plan.json.*whole file"):
        load_plan(plan_file)
    with pytest.raises(PlacementError, match=r"^plan: cannot read .*missing.json"):
        load_plan(plan_file.with_name("missing.json"))
