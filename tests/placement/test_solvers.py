"""What every solver owes its caller, from inside or outside. Solvers are listed: a new one is tested by being there."""

from __future__ import annotations

import inspect
import itertools
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.cost import Layout, PlanCost, evaluate
from placement.errors import PlacementError
from placement.plan import PlacementPlan, check_layout
from placement.problem import PlacementProblem
from placement.run import Run
from placement.solve import find_plan, find_solver, prove
from placement.solvers import layer_states, solver, solver_names
from placement.topology import Topology

from ..laws import laws_of

law = laws_of(solver)
NEAR = 1e-9
QUICK = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_problem(seed: int, layers: int, experts: int, devices: int, **given_settings: Any) -> PlacementProblem:
    """Skewed transitions, so that there is something to win."""
    rng = np.random.default_rng(seed)
    transitions = rng.gamma(0.2, size=(layers - 1, experts, experts))
    load = rng.gamma(1.0, size=(layers, experts)) + 0.05
    topology = given_settings.pop("topology", None) or Topology.even(devices)
    return PlacementProblem(load, transitions, topology, **given_settings)


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    """Every feature at some time: nodes, limits, prices, pins, a plan in force, unequal speeds, empty devices."""
    devices = draw(st.sampled_from([1, 2, 3, 4, 7, 9]))
    experts, layers = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    per_node = draw(st.sampled_from([n for n in (1, 2, devices) if devices % n == 0]))
    chosen: dict[str, Any] = {
        "topology": Topology(
            node_of=np.arange(devices) // per_node,
            node_hop_cost=draw(st.sampled_from([1.0, 3.0])),
            speed=rng.uniform(0.5, 2, devices) if draw(st.booleans()) else np.zeros(0),
        ),
        "max_imbalance": draw(st.sampled_from([None, 1.2, 2.0])),
        "balance_price": draw(st.sampled_from([0.0, 0.3])),
    }
    if draw(st.booleans()):
        chosen |= {"current": rng.integers(devices, size=(layers, experts)), "migration_price": 0.5}
    if draw(st.booleans()):
        chosen["pinned"] = np.full((layers, experts), -1)
        chosen["pinned"][rng.integers(layers), rng.integers(experts)] = rng.integers(devices)
    return random_problem(int(rng.integers(10_000)), layers, experts, devices, **chosen)


def every_layer(problem: PlacementProblem, layer: int) -> list[tuple[int, ...]]:
    """All ways to place one layer that keep slots and pins."""
    pins = problem.pinned[layer]
    return [
        way
        for way in itertools.product(range(problem.num_devices), repeat=problem.num_experts)
        if np.all(np.bincount(way, minlength=problem.num_devices) <= problem.slots)
        and np.all((pins < 0) | (pins == np.array(way)))
    ]


def brute_force(problem: PlacementProblem) -> PlanCost:
    """The best cost over every layout without replicas, by trying them all."""
    ways = [every_layer(problem, layer) for layer in range(problem.num_layers)]
    costs = (evaluate(problem, Layout(np.array(rows))) for rows in itertools.product(*ways))
    return min(costs, key=lambda cost: cost.rank)


@cache
def three_layers() -> tuple[PlacementProblem, PlanCost]:
    """A problem, and its best cost."""
    problem = random_problem(5, 3, 6, 2)
    return problem, brute_force(problem)


def applies(problem: PlacementProblem, name: str) -> bool:
    """What the solver's module says; a solver that says nothing is for every problem."""
    module = sys.modules[inspect.unwrap(find_solver(name)).__module__]
    return bool(getattr(module, "applies", lambda problem: True)(problem))


@law(5)
def plan_or_none(problem: PlacementProblem, name: str) -> PlacementPlan | None:
    """None where the method says that it is not for this problem."""
    if applies(problem, name):
        return find_plan(problem, name, effort=2, time_limit_s=0.5)
    with pytest.raises(PlacementError, match=r"^solver: "):
        find_plan(problem, name, effort=2, time_limit_s=0.5)
    return None


def check(problem: PlacementProblem, plan: PlacementPlan) -> None:
    """A layout within slots and pins, its cost recomputed, its bound not above it."""
    check_layout(plan.layout, problem.slots, problem.spare_slots)
    pinned = problem.pinned >= 0
    assert np.array_equal(plan.layout.device_of[pinned], problem.pinned[pinned])
    assert evaluate(problem, plan.layout) == plan.cost
    assert plan.lower_bound <= plan.cost.total + NEAR or not plan.cost.feasible
    assert 0 <= plan.gap <= 1


@pytest.mark.parametrize("name", solver_names())
@QUICK
@given(problem=problems())
@law(1)
def test_plans_are_valid_and_cost_what_they_say(name: str, problem: PlacementProblem) -> None:
    plan = plan_or_none(problem, name)
    if plan is not None:
        check(problem, plan)


@pytest.mark.parametrize("name", solver_names())
@pytest.mark.parametrize(("devices", "per_node"), [(7, 7), (12, 12), (12, 3), (12, 1)])
@law(1)
def test_devices_may_stay_empty(name: str, devices: int, per_node: int) -> None:
    """Six experts; a device or a whole node holds none, with and without room for replicas."""
    for spare in (0, 1):
        topology = Topology.even(devices, per_node, node_hop_cost=3.0)
        problem = random_problem(1, 3, 6, devices, topology=topology, spare_slots=spare)
        plan = plan_or_none(problem, name)
        if plan is not None:
            check(problem, plan)


@pytest.mark.parametrize("name", ["auto", "local_search"])
@QUICK
@given(problem=problems())
def test_never_worse_than_round_robin_or_load_balance(name: str, problem: PlacementProblem) -> None:
    ours = find_plan(problem, name, effort=2, time_limit_s=5)
    for simple in ("round_robin", "load_balance"):
        assert ours.cost.rank <= tuple(np.add(find_plan(problem, simple).cost.rank, NEAR))


TINY = [
    {},
    {"max_imbalance": 1.3},
    {"balance_price": 0.4},
    {"topology": Topology(np.array([0, 0, 1]), node_hop_cost=3.0)},
    {"topology": Topology(np.zeros(3, np.int64), speed=np.array([1.0, 2.0, 1.0]), memory_bytes=np.array([2, 6, 4]))},
    {"current": np.array([[0, 0, 1, 1, 2, 2]] * 2), "migration_price": 0.4},
]


@pytest.mark.parametrize(
    "features",
    [TINY[0], *(pytest.param(f, marks=pytest.mark.slow) for f in TINY[1:])],
    ids=lambda features: "+".join(features) or "plain",
)
def test_exact_methods_agree_with_brute_force(features: dict[str, Any]) -> None:
    problem = random_problem(3, 2, 6, 3, **features)
    best = brute_force(problem)
    assert layer_states.applies(problem)
    for name in ("layer_states", "ilp", "auto"):
        plan = find_plan(problem, name)
        assert plan.cost.rank == pytest.approx(best.rank, abs=1e-7)
        assert plan.lower_bound <= best.total + NEAR


@pytest.mark.parametrize("name", ["layer_states", "ilp"])
def test_what_is_called_optimal_is(name: str) -> None:
    problem, best = three_layers()
    plan = find_plan(problem, name)
    assert plan.optimal
    assert plan.gap == 0.0
    assert plan.cost.total == pytest.approx(best.total, abs=1e-9)


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_local_search_finds_the_optimum_of_a_mixtral_sized_chain(devices: int) -> None:
    problem = random_problem(7, 8, 8, devices)
    exact = find_plan(problem, "layer_states")
    assert exact.optimal
    assert find_plan(problem, "local_search", effort=10).cost.total <= 1.01 * exact.cost.total


def test_auto_has_an_answer_when_there_is_no_time_for_the_exact_one() -> None:
    plan = find_plan(random_problem(7, 4, 8, 2), "auto", time_limit_s=0.0)
    assert not plan.complete
    assert not plan.optimal


@pytest.mark.parametrize("name", solver_names())
@law(2)
def test_the_same_seed_gives_the_same_plan(name: str) -> None:
    problem = random_problem(11, 3, 6, 2)
    first, second = (find_plan(problem, name, seed=4, effort=3) for _ in range(2))
    assert np.array_equal(first.layout.device_of, second.layout.device_of)


@pytest.mark.parametrize("name", solver_names())
@law(3)
def test_what_is_found_is_offered(name: str) -> None:
    problem = random_problem(11, 3, 6, 2)
    run = Run(problem, effort=2)
    layout = find_solver(name)(problem, run)
    assert run.best_cost is not None
    assert run.best_cost.rank <= evaluate(problem, layout).rank


@pytest.mark.parametrize("name", solver_names())
@law(4)
def test_only_an_optimum_is_called_one(name: str) -> None:
    problem, best = three_layers()
    run = Run(problem, effort=2)
    find_solver(name)(problem, run)
    if run.optimal:
        assert run.best_cost is not None
        assert run.best_cost.total == pytest.approx(best.total, abs=1e-9)
        assert run.optimal_by


@pytest.mark.parametrize("name", solver_names())
@law(6)
def test_a_search_ends_soon_after_its_time(name: str) -> None:
    problem = random_problem(1, 10, 32, 8)
    if applies(problem, name):
        start = time.thread_time()
        find_plan(problem, name, effort=1000, time_limit_s=0.3)
        assert time.thread_time() - start < 5


@given(seed=st.integers(0, 500), order=st.permutations(range(4)))
def test_renaming_alike_devices_changes_no_cost(seed: int, order: list[int]) -> None:
    problem = random_problem(seed, 4, 8, 4)
    device_of = find_plan(problem, "chain").layout.device_of
    renamed = evaluate(problem, Layout(np.array(order)[device_of]))
    assert renamed.total == pytest.approx(evaluate(problem, Layout(device_of)).total, abs=1e-12)


def test_more_room_is_used_only_if_it_pays() -> None:
    tight = random_problem(2, 4, 8, 2)
    copies = find_plan(tight.with_(spare_slots=2), "auto", effort=3)
    assert len(copies.layout.replicas)
    assert copies.cost.total < find_plan(tight, "auto", effort=3).cost.total


def test_replicas_keep_a_limit_that_one_copy_breaks() -> None:
    """One expert has 70 % of the load: alone it makes its device 1.4 times as busy as fair."""
    load = np.array([[0.7, 0.1, 0.1, 0.1]])
    problem = PlacementProblem(load, np.zeros((0, 4, 4)), Topology.even(2), max_imbalance=1.1)
    assert not find_plan(problem, "auto").cost.feasible
    assert find_plan(problem.with_(spare_slots=1), "auto").cost.feasible


def test_a_feasible_answer_is_not_called_optimal() -> None:
    """In a tenth of a second HiGHS and CBC prove nothing about 12 x 12 on 4 devices."""
    problem = random_problem(1, 12, 12, 4)
    run = Run(problem, time_limit_s=0.1)
    find_solver("ilp")(problem, run)
    assert not run.optimal
    assert run.cut_short


def test_ctrl_c_returns_the_best_so_far() -> None:
    def interrupt(what: str, cost: PlanCost) -> None:
        if what.startswith("start"):
            raise KeyboardInterrupt

    problem = random_problem(1, 6, 12, 4)
    plan = find_plan(problem, "auto", progress=interrupt)
    assert not plan.complete
    assert plan.cost.total < find_plan(problem, "round_robin").cost.total


def test_ctrl_c_before_anything_was_found_gives_round_robin(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(problem: PlacementProblem, run: Run) -> Layout:
        raise KeyboardInterrupt

    monkeypatch.setattr("placement.solvers.chain.solve", interrupted)
    problem = random_problem(1, 6, 12, 4)
    assert find_plan(problem, "chain").cost == find_plan(problem, "round_robin").cost


def test_out_of_time_says_so() -> None:
    plan = find_plan(random_problem(1, 10, 32, 8), "local_search", effort=1000, time_limit_s=0.3)
    assert not plan.complete
    assert plan.seconds < 5


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(PlacementError, match=r"solver: 'simplex' is not one of auto, "):
        find_plan(random_problem(1, 2, 4, 2), "simplex")


Bounded = Callable[[PlacementProblem], float]


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), limit=st.sampled_from([None, 1.3]), cost=st.sampled_from([1.0, 4.0]))
def test_no_layout_is_below_the_bound(seed: int, limit: float | None, cost: float) -> None:
    topology = Topology.even(4, 2, node_hop_cost=cost)
    problem = random_problem(seed, 3, 8, 4, topology=topology, max_imbalance=limit)
    exact = find_plan(problem, "layer_states")
    bound = prove(problem, 0.3)
    if exact.cost.feasible:
        assert bound.value <= exact.cost.total + NEAR


@pytest.mark.slow
def test_the_semidefinite_bound_is_tight_on_planted_groups() -> None:
    """Experts in 4 groups that mostly talk among themselves, with noise that misleads the row-top bound."""
    groups = np.arange(16) // 4
    inside = groups[:, None] == groups[None, :]
    transitions = np.random.default_rng(0).gamma(np.where(inside, 1.0, 0.05), size=(5, 16, 16))
    problem = PlacementProblem(np.ones((6, 16)), transitions, Topology.even(4))
    found = find_plan(problem, "local_search", effort=3).cost.total
    bound = prove(problem, 10.0)
    assert bound.method == "semidefinite"
    assert 0.95 * found <= bound.value <= found + NEAR
