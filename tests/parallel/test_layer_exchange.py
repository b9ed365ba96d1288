"""One MoE layer over several ranks, in both modes, against the sum on one; no processes and no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_serve.parallel.modes.conventional import ConventionalExperts
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.recompute import RanksDivergedError, RecomputingExperts
from predictors.shape import MoELayer
from tests.support.traffic_forecast import RowBytes, forecast

from .conftest import Mesh
from .meshes import HIDDEN, at_once, expected, shared_layers

EXPERTS, TOP_K, TOKENS = 6, 2, 12
DTYPES = [torch.float32, torch.bfloat16]


def random_hosts(num_ranks: int, num_copies: int, num_layers: int = 1) -> NDArray[np.bool_]:
    rng = np.random.default_rng(num_ranks + num_copies)
    order = rng.random((num_layers, EXPERTS, num_ranks)).argsort(2)
    copies = rng.integers(1, num_copies + 1, (num_layers, EXPERTS, 1))
    return order < copies


def random_tokens(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, ids, weights; small whole numbers, so that sums are exact in bf16 too."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-3, 4, (TOKENS, HIDDEN), generator=generator).to(dtype)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.randint(1, 3, (TOKENS, TOP_K), generator=generator) / 2
    return hidden, ids, weights


def total(shared: list[ExpertShare], name: str) -> int:
    return sum(each.exchange.traffic.totals()[name] for each in shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_ranks", "num_copies"), [(2, 1), (3, 1), (3, 3)])
def test_conventional(mesh: Mesh, num_ranks: int, num_copies: int, dtype: torch.dtype) -> None:
    shared = shared_layers(mesh(num_ranks), random_hosts(num_ranks, num_copies), TOP_K, dtype)
    tokens = [random_tokens(dtype, rank) for rank in range(num_ranks)]
    layers = [ConventionalExperts(each) for each in shared]
    found = at_once(*(lambda each=each, t=t: each.run(FIRST, *t) for each, t in zip(layers, tokens, strict=True)))
    for result, own in zip(found, tokens, strict=True):
        assert torch.equal(result, expected(*own))
    assert total(shared, "trips") <= 2 * num_ranks


FIRST, SECOND = MoELayer(0), MoELayer(1)


def recompute(
    shared: list[ExpertShare], tokens: Any, homes: torch.Tensor, layer: MoELayer, last_layer: MoELayer
) -> list[Any]:
    """The layer on every rank, all tokens sampled but the first."""
    calls = []
    for each in shared:
        layers = RecomputingExperts(each, MoELayer(last_layer))
        layers.begin(homes, torch.arange(1, TOKENS))
        calls.append(lambda layers=layers: layers.run(layer, *tokens))
    return at_once(*calls)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_ranks", "num_copies"), [(2, 1), (3, 1), (2, 2), (3, 3)])
def test_recompute(mesh: Mesh, num_ranks: int, num_copies: int, dtype: torch.dtype) -> None:
    hosts = random_hosts(num_ranks, num_copies, num_layers=2)
    shared = shared_layers(mesh(num_ranks), hosts, TOP_K, dtype)
    tokens, homes = random_tokens(dtype), torch.arange(TOKENS) % num_ranks
    for result in recompute(shared, tokens, homes, layer=FIRST, last_layer=SECOND):
        assert torch.equal(result, expected(*tokens))
    assert total(shared, "trips") <= num_ranks
    for rank, result in enumerate(recompute(shared, tokens, homes, layer=SECOND, last_layer=SECOND)):
        mine = (homes == rank) & (torch.arange(TOKENS) > 0)
        assert torch.equal(result[mine], expected(*tokens)[mine])
    sizes = RowBytes.of("coherent", HIDDEN, TOP_K, dtype.itemsize)
    ids = tokens[1][:, None].expand(-1, 2, -1).numpy()
    first = forecast("coherent", ids[1:], hosts, homes[1:].numpy(), sizes).bytes_per_token * (TOKENS - 1)
    only_first_layer = forecast("coherent", ids[:1], hosts, homes[:1].numpy(), sizes)
    last = forecast("coherent", ids[:1, 1:], hosts[1:], homes[:1].numpy(), sizes)
    unsampled = only_first_layer.bytes_per_token - last.bytes_per_token
    assert total(shared, "combine_bytes") == pytest.approx(first + unsampled)


def test_recompute_marks_what_could_not_be_read(mesh: Mesh) -> None:
    shared = shared_layers(mesh(2), random_hosts(2, 1, num_layers=2), TOP_K)
    hidden, ids, weights = random_tokens(torch.float32)
    for each in shared:
        each.local.unreadable = 2  # type: ignore[attr-defined]
    notes = []
    calls = []
    for each in shared:
        layers = RecomputingExperts(each, MoELayer(1))
        notes.append(layers.losses)
        layers.begin(torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS))
        calls.append(lambda layers=layers: layers.run(FIRST, hidden, ids, weights))
    at_once(*calls)
    lost = (ids == 2).any(1).nonzero()[:, 0].tolist()
    assert [sorted(note.take()) for note in notes] == [lost, lost]


def test_ranks_that_do_not_compute_alike_are_found(mesh: Mesh) -> None:
    shared = shared_layers(mesh(2), random_hosts(2, 1, num_layers=2), TOP_K)
    hidden, ids, weights = random_tokens(torch.float32)
    calls = []
    for rank, each in enumerate(shared):
        layers = RecomputingExperts(each, MoELayer(1))
        layers.begin(torch.zeros(TOKENS, dtype=torch.int64), torch.arange(TOKENS))
        mine = ids if rank else ids.flip(1)
        calls.append(lambda layers=layers, mine=mine: layers.run(FIRST, hidden, mine, weights))
    for result in at_once(*calls):
        assert isinstance(result, RanksDivergedError)
        assert "--ep-mode conventional" in str(result)
