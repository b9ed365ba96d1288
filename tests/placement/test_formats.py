"""Round trips of plans, exports and recordings; migrations replayed step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cost import Layout, hosts_of
from placement.drift import Stakes, judge
from placement.errors import PlacementError
from placement.formats import from_physical, from_sglang, physical_to_logical, read_load, to_eplb, to_sglang
from placement.migrate import migration_steps, moved_bytes
from placement.page import as_page
from placement.picture import save_picture
from placement.plan import PlacementPlan, load_plan, make_plan, save_plan
from placement.problem import PlacementProblem
from placement.solve import find_plan
from placement.topology import Topology


def problem(seed: int = 0, spare: int = 0) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    steps = rng.gamma(0.2, size=(3, 8, 8))
    return PlacementProblem(rng.gamma(1, size=(4, 8)) + 0.1, steps, Topology.even(4), spare_slots=spare)


def random_plan(seed: int, copies: bool) -> PlacementPlan:
    rng = np.random.default_rng(seed)
    device_of = np.stack([rng.permutation(np.arange(8) % 4) for _ in range(4)])
    rows = [(la, ex, (device_of[la, ex] + 1) % 4) for la in range(4) for ex in rng.permutation(8)[:1]]
    layout = Layout(device_of, np.array(rows if copies else [], np.int64).reshape(-1, 3))
    return make_plan(problem(seed, spare=int(copies)), layout, 0.0, "none", solver="random", seed=seed, seconds=0.0)


def same(one: Layout, two: Layout, num_devices: int = 4) -> bool:
    return bool(np.array_equal(hosts_of(one, num_devices), hosts_of(two, num_devices)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), copies=st.booleans())
def test_a_plan_survives_its_file(tmp_path_factory: pytest.TempPathFactory, seed: int, copies: bool) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan = random_plan(seed, copies)
    save_plan(plan, path)
    assert load_plan(path).to_json() == plan.to_json()


@given(seed=st.integers(0, 1000))
def test_sglang_files_come_back(seed: int) -> None:
    plan = random_plan(seed, copies=False)
    data = to_sglang(plan, [1, 2, 3, 5], 7)
    assert list(data) == ["physical_to_logical_map"]
    assert np.shape(data["physical_to_logical_map"]) == (7, 8)
    assert same(from_sglang(data, 8, 4, [1, 2, 3, 5]), plan.layout)


@given(seed=st.integers(0, 1000))
def test_copies_come_back_and_only_fill_places_up(seed: int) -> None:
    plan = random_plan(seed, copies=True)
    back = hosts_of(from_physical(physical_to_logical(plan), 8, 4), 4)
    assert np.all(back[hosts_of(plan.layout, 4)])
    assert np.all(back.sum(1) == 3)


def test_eplb_maps_of_one_layer() -> None:
    """4 experts on 2 devices, expert 0 on both, 3 places each; device 1 is full, device 0 too."""
    layout = Layout(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 1], [0, 3, 0]]))
    one = PlacementProblem(np.ones((1, 4)), np.zeros((0, 4, 4)), Topology.even(2), spare_slots=1)
    maps = to_eplb(make_plan(one, layout, 0.0, "none", solver="hand", seed=0, seconds=0.0))
    assert maps["physical_to_logical_map"].tolist() == [[0, 1, 3, 0, 2, 3]]
    assert maps["logical_to_physical_map"].tolist() == [[[0, 3], [1, -1], [4, -1], [2, 5]]]
    assert maps["logical_count"].tolist() == [[2, 1, 1, 2]]


BAD_MAPS: dict[str, tuple[Any, str]] = {
    "no map": ({}, r"^physical_to_logical_map: is missing"),
    "words": ({"physical_to_logical_map": [["a"]]}, r"^physical_to_logical_map: needs integers"),
    "odd places": ({"physical_to_logical_map": [[0, 1, 2]]}, r"3 places do not divide among 2"),
    "no place": ({"physical_to_logical_map": [[0, 0, 1, 2]]}, r"expert 3 of layer 0 has no place"),
    "expert 9": ({"physical_to_logical_map": [[0, 9, 1, 2]]}, r"needs experts 0..3"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_a_bad_map_is_named(case: str) -> None:
    data, message = BAD_MAPS[case]
    with pytest.raises(PlacementError, match=message):
        from_sglang(data, 4, 2, [0])


def test_loads_of_eplb_and_sglang() -> None:
    weight = np.arange(6.0).reshape(2, 3)
    assert read_load(weight).tolist() == weight.tolist()
    assert read_load({"logical_count": np.stack([weight, weight])}).tolist() == (2 * weight).tolist()
    with pytest.raises(PlacementError, match=r"^logical_count: is missing; the recording has records"):
        read_load({"records": []})
    with pytest.raises(PlacementError, match=r"^load: needs shape \[layers, experts\]"):
        read_load(np.ones(3))
    with pytest.raises(PlacementError, match=r"^load: has negative or non-finite"):
        read_load(np.full((2, 2), np.nan))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), copies=st.booleans(), extra=st.integers(0, 2))
def test_a_migration_arrives_and_never_exceeds_memory(seed: int, copies: bool, extra: int) -> None:
    old, new = random_plan(seed, copies), random_plan(seed + 1, copies)
    room = 2 + copies + extra
    holds, target = hosts_of(old.layout, 4), hosts_of(new.layout, 4)
    host: set[tuple[int, int]] = set()
    steps = migration_steps(old, new, room)
    for step in steps:
        if step.action == "copy":
            assert holds[step.layer, step.expert, step.source]
        if step.action == "restore":
            assert (step.layer, step.expert) in host
        if step.action in ("copy", "restore"):
            holds[step.layer, step.expert, step.target] = True
        else:
            assert holds[step.layer, step.expert, step.source]
            holds[step.layer, step.expert, step.source] = False
        if step.action == "park":
            host.add((step.layer, step.expert))
        assert np.all(holds.sum(1) <= room)
        assert all(holds[la, ex].any() or (la, ex) in host for la in range(4) for ex in range(8))
    assert np.array_equal(holds, target)
    assert moved_bytes(steps, 10) == 10 * int((target & ~hosts_of(old.layout, 4)).sum()) or host


def test_nothing_moves_between_equal_plans() -> None:
    assert migration_steps(random_plan(1, False), random_plan(1, False)) == []


def test_too_little_room_is_named() -> None:
    with pytest.raises(PlacementError, match=r"^room: the plans themselves need 2 places"):
        migration_steps(random_plan(1, False), random_plan(2, False), 1)


@pytest.mark.parametrize(("horizon", "pays"), [(1, False), (10_000_000, True)])
def test_a_move_pays_if_it_is_used_long_enough(horizon: int, pays: bool) -> None:
    live = problem(3).with_(expert_bytes=1000)
    old, new = find_plan(live, "round_robin"), find_plan(live, "auto", effort=3)
    verdict = judge(live, old, new, Stakes(hidden_bytes=8, horizon_tokens=horizon, choices_per_hop=1.0))
    assert verdict.adopt is pays
    assert verdict.traffic_then < verdict.traffic_now


def test_the_page_and_the_picture(tmp_path: Path) -> None:
    posed = problem()
    plans = [find_plan(posed, "contiguous"), find_plan(posed, "auto", effort=2)]
    page = as_page(posed, plans, plans[0], plans[1])
    assert page.count("<svg") == page.count('role="img"') == 8, "four maps, each with its scale"
    assert page.count(">GPU</text>") == 6, "across each map, and down those of traffic"
    assert "light-dark" in page
    assert 'name="viewport"' in page
    assert "http" not in page
    save_picture(posed, plans[0], plans[1], tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
