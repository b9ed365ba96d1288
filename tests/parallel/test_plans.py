"""Placements held against a model, choice among copies, and where a predictor puts sequences. No processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_serve.errors import ConfigError
from moe_serve.parallel.expert_plans import read_hosts
from moe_serve.parallel.front.prescheduling import Prescheduler
from moe_serve.parallel.front.token_uses import TokenUses, count_uses, load_uses
from moe_serve.parallel.modes.ownership import Ownership
from placement.cost import Hosts, Layout
from placement.plan import make_plan, save_plan
from placement.problem import PlacementProblem
from placement.topology import Topology
from predictors.shape import MoELayer
from predictors.trace import RoutingTrace
from tests.support.traffic_forecast import RowBytes, forecast

LAYERS = (1, 2)


def plan_file(folder: Path, **changes: Any) -> str:
    """2 layers of 4 experts on 2 devices; `changes` to the JSON."""
    problem = PlacementProblem(np.ones((2, 4)), np.ones((1, 4, 4)), Topology.even(2))
    layout = Layout(np.array([[0, 1, 0, 1], [1, 1, 0, 0]]))
    path = folder / "plan.json"
    save_plan(make_plan(problem, layout, 0.0, "none", solver="test", seed=0, seconds=0.0), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(path)


def test_plan_becomes_hosts(tmp_path: Path) -> None:
    hosts = read_hosts(plan_file(tmp_path), LAYERS, 4, 2)
    assert hosts.argmax(2).tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("layers", "experts", "ranks", "field"),
    [((1, 2, 3), 4, 2, "num_layers"), (LAYERS, 8, 2, "num_experts"), (LAYERS, 4, 3, "num_devices")],
)
def test_plan_of_another_model(tmp_path: Path, layers: Any, experts: int, ranks: int, field: str) -> None:
    with pytest.raises(ConfigError, match=f"--expert-plan .*{field} is"):
        read_hosts(plan_file(tmp_path), layers, experts, ranks)


def test_plan_of_other_layers(tmp_path: Path) -> None:
    path = plan_file(tmp_path, provenance={"layer_ids": [0, 1]})
    with pytest.raises(ConfigError, match=r"layer_ids are \[0, 1\], this model's MoE layers are \[1, 2\]"):
        read_hosts(path, LAYERS, 4, 2)


def test_damaged_plan(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--expert-plan: .*cannot read"):
        read_hosts(str(tmp_path / "bad.json"), LAYERS, 4, 2)


def contiguous(num_layers: int, num_experts: int, num_ranks: int) -> Hosts:
    """Where experts are without a plan."""
    return read_hosts(None, range(num_layers), num_experts, num_ranks)


def test_contiguous_is_uneven_where_it_must_be() -> None:
    assert contiguous(1, 8, 3)[0].sum(0).tolist() == [3, 3, 2]
    with pytest.raises(ConfigError, match="--devices 9"):
        contiguous(1, 8, 9)


def test_copies_are_chosen_by_place_then_company_then_load() -> None:
    hosts = np.zeros((1, 4, 3), bool)
    hosts[0, 0, [0, 1]] = hosts[0, 1, [1, 2]] = hosts[0, 2, 2] = hosts[0, 3, [1, 2]] = True
    ownership = Ownership(hosts, 0, torch.device("cpu"))
    ids = torch.tensor([[0, 2], [1, 2]])
    assert ownership.choose(MoELayer(0), ids).tolist() == [
        [0, 2],
        [2, 2],
    ]  # here; where expert 2 takes the token anyway
    assert ownership.choose(MoELayer(0), torch.tensor([[3]])).tolist() == [[1]]  # rank 2 is busier now


def two_tokens() -> TokenUses:
    """Token 7 used expert 0, token 9 expert 3, in the only layer, of 4 experts."""
    return count_uses(
        RoutingTrace(np.array([[[0]], [[3]]]), np.array([0, 2]), np.array([0]), 4, token_ids=np.array([7, 9]))
    )


def test_prescheduler_follows_the_table_until_a_rank_is_far_ahead() -> None:
    hosts = contiguous(1, 4, 2)
    scheduler = Prescheduler(hosts, two_tokens())
    assert [scheduler.home([7, 7], [0, 0]), scheduler.home([9], [100, 0])] == [0, 1]
    assert scheduler.home([9], [0, 5000]) == 0
    assert scheduler.home([1, 8, 9, 500], [0, 0]) == 1  # the others were never seen
    assert scheduler.home([1], [8, 3]) == 1
    scheduler.place(hosts[:, ::-1])  # experts 0 and 1 are on rank 1 now
    assert [scheduler.home([7, 7], [0, 0]), scheduler.home([9], [100, 0])] == [1, 0]
    assert Prescheduler(hosts).home([9], [3, 1]) == 1


def test_forecast_counts_what_travels() -> None:
    """One token at home on rank 0, two layers, two choices; experts 0 and 1 on rank 0, 2 and 3 on rank 1."""
    hosts, homes = contiguous(2, 4, 2), np.array([0])
    ids = np.array([[[2, 3], [2, 0]]])
    sizes = RowBytes(dispatch=100, combine=10, whole=5)
    sent = forecast("conventional", ids, hosts, homes, sizes)
    assert (sent.dispatch_rows, sent.combine_rows, sent.bytes_per_token) == (2, 2, 220)
    shared = forecast("coherent", ids, hosts, homes, sizes)  # rank 1 has it whole; then its part goes home
    assert (shared.whole_rows, shared.combine_rows, shared.bytes_per_token) == (1, 1, 15)


def test_what_every_rank_holds_is_not_sent_when_all_recompute() -> None:
    hosts = contiguous(2, 4, 2)
    hosts[:, 3] = True
    ids = np.array([[[3], [3]], [[0], [3]]])
    sizes = RowBytes(dispatch=100, combine=10, whole=5)
    assert forecast("coherent", ids, hosts, np.array([0, 1]), sizes).whole_rows == 0.5


def test_ranks_agree_whoever_asks() -> None:
    """Expert 0 is on ranks 0 and 1, expert 1 on 1 and 2: together they are on rank 1."""
    hosts = np.zeros((1, 2, 3), bool)
    hosts[0, 0, [0, 1]] = hosts[0, 1, [1, 2]] = True
    ids = np.array([[0, 1], [1, 0], [0, 0]])
    found = [Ownership(hosts, rank, torch.device("cpu")).agree(MoELayer(0), ids, None).tolist() for rank in range(3)]
    assert found[0][:2] == [[1, 1], [1, 1]]
    assert found[1:] == found[:1] * 2
    at_home = Ownership(hosts, 0, torch.device("cpu")).agree(MoELayer(0), ids[:2], np.array([0, 2]))
    assert at_home.tolist() == [[0, 1], [2, 0]]


def test_groups_are_alike_for_the_prescheduler() -> None:
    scheduler = Prescheduler(contiguous(1, 4, 2), two_tokens())
    assert [scheduler.home([9], [0, 0, 0, 0]), scheduler.home([9], [0, 8, 0, 0])] == [1, 3]


def test_uses_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "uses.npz"
    two_tokens().save(path)
    uses = load_uses(str(path))
    assert (uses.token_ids.tolist(), uses.layer_ids.tolist()) == ([7, 9], [0])
    assert uses.counts.tolist() == [[[1, 0, 0, 0]], [[0, 0, 0, 1]]]
    uses.check_fit("uses.npz", (0,), 4)
    with pytest.raises(ConfigError, match=r"--ep-predictor uses.npz: layer_ids: \[0\], but this model has \[1\]"):
        uses.check_fit("uses.npz", (1,), 4)
    with pytest.raises(ConfigError, match="experts per layer: 4, but this model has 8"):
        uses.check_fit("uses.npz", (0,), 8)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"counts": None}, "counts: missing"),
        ({"counts": np.ones((2, 1, 4))}, "counts: float64"),
        ({"counts": np.ones((2, 4), int)}, "counts: int64"),
        ({"counts": np.ones((3, 1, 4), int)}, r"counts: \(3, 1, 4\) do not go with"),
        ({"token_ids": np.array([9, 7])}, "do not go with"),
    ],
)
def test_damaged_uses_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "uses.npz"
    good = {"token_ids": np.array([7, 9]), "counts": np.ones((2, 1, 4), int), "layer_ids": np.array([0])}
    np.savez(path, **{name: array for name, array in {**good, **changes}.items() if array is not None})
    with pytest.raises(ConfigError, match=f"--ep-predictor .*{complaint}"):
        load_uses(str(path))
    with pytest.raises(ConfigError, match=r"none.npz: file: does not exist; .* with `moe-serve predictor tokens`"):
        load_uses(str(tmp_path / "none.npz"))
