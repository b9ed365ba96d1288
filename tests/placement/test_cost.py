"""The stated cost is the one counted token by token, from routes and not from transitions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.cost import Layout, device_load, device_traffic, evaluate
from placement.problem import PlacementProblem, count_load, count_transitions
from placement.topology import Topology

Ids = npt.NDArray[np.int64]


def routes(seed: int, tokens: int = 40, layers: int = 4, experts: int = 6, top_k: int = 2) -> Ids:
    rng = np.random.default_rng(seed)
    return np.array([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(tokens)])


def hops(ids: Ids, choices: str) -> list[tuple[int, int, int]]:
    """(layer, expert, next expert) of every counted step, one by one."""
    found = []
    for token, layer in itertools.product(range(ids.shape[0]), range(ids.shape[1] - 1)):
        here, there = ids[token, layer].tolist(), ids[token, layer + 1].tolist()
        pairs = [(here[0], there[0])] if choices == "top1" else itertools.product(here, there)
        found += [(layer, i, j) for i, j in pairs]
    return found


@given(seed=st.integers(0, 1000), choices=st.sampled_from(["all", "top1"]))
def test_cost_is_what_counting_hop_by_hop_gives(seed: int, choices: str) -> None:
    ids = routes(seed)
    topology = Topology(np.array([0, 0, 1]), node_hop_cost=5.0)
    problem = PlacementProblem.from_routes(ids, 6, topology, choices)
    device_of = np.stack([np.random.default_rng(seed + la).permutation([0, 0, 1, 1, 2, 2]) for la in range(4)])
    cost = evaluate(problem, Layout(device_of))
    steps = [(device_of[la, i], device_of[la + 1, j]) for la, i, j in hops(ids, choices)]
    expected = np.mean([topology.hop_costs[a, b] for a, b in steps])
    assert cost.traffic == pytest.approx(expected, abs=1e-12)
    assert cost.cross_device == pytest.approx(np.mean([a != b for a, b in steps]))
    assert cost.cross_node == pytest.approx(np.mean([topology.node_of[a] != topology.node_of[b] for a, b in steps]))
    busiest = [
        np.bincount(device_of[la][ids[:, la].ravel()], minlength=3).max() / ids[:, la].size * 3 for la in range(4)
    ]
    assert cost.balance_mean == pytest.approx(np.mean(busiest))
    assert cost.balance_worst == pytest.approx(max(busiest))


def test_transitions_of_the_docstring_example() -> None:
    ids = np.array([[[0, 1], [1, 2]]])
    assert np.argwhere(count_transitions(ids, 3, "top1")[0]).tolist() == [[0, 1]]
    assert np.argwhere(count_transitions(ids, 3, "all")[0]).tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert count_load(ids, 3).tolist() == [[1, 1, 0], [0, 1, 1]]


def chain_problem(**settings: Any) -> PlacementProblem:
    """2 layers, 2 experts, 2 devices. Expert 0 -> 0 weighs 1, 1 -> 0 weighs 1."""
    transitions = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    return PlacementProblem(np.ones((2, 2)), transitions, Topology.even(2), spare_slots=1, **settings)


def test_a_replica_where_the_tokens_are_saves_their_hop() -> None:
    device_of = np.array([[0, 1], [0, 1]])
    assert evaluate(chain_problem(), Layout(device_of)).traffic == pytest.approx(0.5)
    copy = np.array([[1, 0, 1]])
    assert evaluate(chain_problem(), Layout(device_of, copy)).traffic == 0.0


def test_even_routing_shares_copies_and_crosses_half_the_time() -> None:
    layout = Layout(np.array([[0, 1], [0, 1]]), np.array([[1, 0, 1]]))
    problem = chain_problem(replica_routing="even")
    assert evaluate(problem, layout).traffic == pytest.approx(0.5)
    assert device_load(problem, layout)[1].tolist() == pytest.approx([0.25, 0.75])


def test_traffic_between_devices_adds_up() -> None:
    problem = chain_problem()
    layout = Layout(np.array([[0, 1], [1, 0]]), np.array([[0, 0, 1]]))
    assert device_traffic(problem, layout).sum() == pytest.approx(1.0)
    assert device_load(problem, layout).sum(1) == pytest.approx([1.0, 1.0])
