"""RegroupedExperts: right numbers from every layout, and the same bits wherever the experts are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cache.policies import policy_names
from expert_cache.prefetch.advisors import Advice, FromAffinity, FromNextGate
from expert_cache.running.local_experts import RegroupedExperts
from expert_cache.running.regroup import regroup
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.live_shadows import LiveShadows
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.fetch import Fetcher
from moe_serve.hf.activations import clamped, gated
from predictors.shape import MoELayer

from .caches import cached_layers, mapped_layers
from .stores import FIRST, LAYERS, SECOND, SILU, STORES, E, H, expected, routing, split_store

CAPACITIES = {
    "one_slot_in_all": Capacity.shared(1),
    "fewer_than_a_token_needs": Capacity.shared(2),
    "one_per_layer": Capacity.uniform(1, 2),
    "uneven": Capacity.per_layer([1, 4]),
    "half": Capacity.shared(5),
    "all": Capacity.shared(10),
}


@pytest.fixture(params=STORES)
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_every_layout_matches_a_plain_loop(layout: str, tokens: int, tmp_path: Path) -> None:
    make, activation = STORES[layout]
    store = make(tmp_path)
    got = mapped_layers(store, activation).run(FIRST, *routing(tokens))
    torch.testing.assert_close(got.double(), expected(store, activation, FIRST, *routing(tokens)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_bf16_weights_under_float32_activations(layout: str, tokens: int, tmp_path: Path) -> None:
    make, activation = STORES[layout]
    store = make(tmp_path, torch.bfloat16)
    got = mapped_layers(store, activation).run(SECOND, *routing(tokens))
    want = expected(store, activation, SECOND, *routing(tokens))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


def test_bf16_activations_are_rounded_where_they_meet_weights(tmp_path: Path) -> None:
    store = split_store(tmp_path, torch.bfloat16)
    hidden, ids, weights = routing(6)
    hidden = hidden.bfloat16()
    got = mapped_layers(store, SILU, torch.bfloat16).run(FIRST, hidden, ids, weights)
    assert got.dtype == torch.bfloat16
    want = expected(store, SILU, FIRST, hidden, ids, weights, inner_dtype=torch.bfloat16)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


def test_matrix_instructions_take_over_at_many_tokens(tmp_path: Path) -> None:
    store = split_store(tmp_path, torch.bfloat16)
    hidden, ids, weights = routing(30)
    got = mapped_layers(store, SILU, torch.bfloat16, matrix_tokens=4).run(FIRST, hidden.bfloat16(), ids, weights)
    want = expected(store, SILU, FIRST, hidden.bfloat16(), ids, weights)
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.1)


A, B = LAYERS
STEPS = [(A, 1, 1), (B, 1, 1), (A, 9, 2), (B, 9, 2), (A, 2, 3), (B, 30, 4), (A, 1, 5), (B, 1, 5), (A, 30, 6)]
"""(layer, tokens, seed): a mix of decoding, prompts and batches."""


def run_steps(
    layers: RegroupedExperts[object], dtype: torch.dtype = torch.float32, choices: int = 2
) -> list[torch.Tensor]:
    outputs = []
    for layer, tokens, seed in STEPS:
        hidden, ids, weights = routing(tokens, choices, seed)
        outputs.append(layers.run(layer, hidden.to(dtype), ids, weights))
        layers.check_integrity()
    return outputs


@pytest.mark.parametrize("capacity", ["half", "all"])
def test_work_of_others_is_done_once_and_while_experts_are_read(capacity: str, tmp_path: Path) -> None:
    store = split_store(tmp_path, torch.float32)
    with cached_layers(store, SILU, CAPACITIES[capacity]) as layers:
        cache = layers.cache
        in_flight: list[int] = []
        for _ in range(2):
            layers.run(FIRST, *routing(1), meanwhile=lambda: in_flight.append(len(cache.in_flight.of_layer(FIRST))))
        assert in_flight == [2, 0]
    calls: list[None] = []
    mapped_layers(store, SILU).run(FIRST, *routing(1), meanwhile=lambda: calls.append(None))
    assert len(calls) == 1


def assert_same_bits(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"step {i}: {STEPS[i]}"


@pytest.mark.parametrize("num_transit", [0, 2])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_at_any_capacity(
    layout: str, dtype: torch.dtype, capacity: str, num_transit: int, tmp_path: Path
) -> None:
    make, activation = STORES[layout]
    store = make(tmp_path, dtype)
    want = run_steps(mapped_layers(store, activation, dtype), dtype)
    with cached_layers(store, activation, CAPACITIES[capacity], dtype, num_transit=num_transit) as layers:
        assert_same_bits(run_steps(layers, dtype), want)
        counters = layers.counters
        assert counters.num_misses > 0
        assert counters.num_hits + counters.num_misses == sum(
            len(regroup(routing(t, 2, s)[1], E).experts) for _, t, s in STEPS
        )


class SlowFile(DirectFile):
    """Slow enough for the first product to start before the down projection is there."""

    def read(self, memory: memoryview, offset: int, needed: int) -> None:
        time.sleep(0.002)
        super().read(memory, offset, needed)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_starting_before_the_whole_expert_is_there_keeps_the_bits(
    layout: str, capacity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_cache.storage.fetch.CHUNK_BYTES", 4096)
    make, activation = STORES[layout]
    store = make(tmp_path)
    want = run_steps(mapped_layers(store, activation))
    with cached_layers(
        store, activation, CAPACITIES[capacity], fetcher=Fetcher(1, SlowFile), start_early_bytes=0
    ) as layers:
        starts = 0
        start = layers.compute.start

        def counting(*args: Any) -> Any:
            nonlocal starts
            starts += 1
            return start(*args)

        monkeypatch.setattr(layers.compute, "start", counting)
        assert_same_bits(run_steps(layers), want)
        assert starts > 0


@pytest.mark.parametrize("policy", policy_names())
def test_the_same_bits_under_any_policy(policy: str, tmp_path: Path) -> None:
    store = split_store(tmp_path)
    want = run_steps(mapped_layers(store, SILU))
    with cached_layers(store, SILU, Capacity.uniform(2, 2), policy=policy) as layers:
        assert_same_bits(run_steps(layers), want)


def test_every_expert_in_every_step_with_one_slot(tmp_path: Path) -> None:
    """Each step needs all five experts and there is room for one: five waves, nothing dropped."""
    store = split_store(tmp_path)
    want = run_steps(mapped_layers(store, SILU), choices=E)
    with cached_layers(store, SILU, Capacity.shared(1)) as layers:
        assert_same_bits(run_steps(layers, choices=E), want)


ROUTERS = [(torch.randn(E, H, generator=torch.Generator().manual_seed(i)), None) for i in range(2)]


class Wrong:
    """Always expects what the router did not choose, in every layer."""

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> list[Advice]:
        others = tuple(e for e in range(E) if e not in experts)
        return [Advice(MoELayer(i), others, (1.0,) * len(others)) for i in range(len(LAYERS))]


class Everything:
    """Expects all experts of the other layer."""

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> list[Advice]:
        return [Advice(MoELayer(1 - layer), tuple(range(E)), tuple(float(E - e) for e in range(E)))]


@pytest.mark.parametrize("advisor", [FromAffinity(2, E), FromNextGate(ROUTERS), Wrong(), Everything()])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_same_bits_whatever_is_predicted(advisor: object, capacity: str, tmp_path: Path) -> None:
    store = split_store(tmp_path)
    want = run_steps(mapped_layers(store, SILU))
    with cached_layers(store, SILU, CAPACITIES[capacity], num_transit=2) as layers:
        layers.advisor = advisor  # type: ignore[assignment]
        assert_same_bits(run_steps(layers), want)


def test_a_growing_and_shrinking_cache_keeps_the_bits(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    want = run_steps(mapped_layers(store, SILU))
    with cached_layers(store, SILU, Capacity.uniform(2, 2)) as layers:
        cache = layers.cache
        for num_slots in (10, 3, 1, 7):
            cache.resize(num_slots)
            assert_same_bits(run_steps(layers), want)
            assert cache.num_resident <= num_slots
            assert cache.used_bytes <= num_slots * store.slot_bytes


def test_all_tokens_to_one_expert(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    hidden, _, weights = routing(9, choices=1)
    ids = torch.full((9, 1), 4)
    got = mapped_layers(store, SILU).run(FIRST, hidden, ids, weights)
    want = expected(store, SILU, FIRST, hidden, ids, weights)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


def test_regroup_example_of_its_docstring() -> None:
    groups = regroup(torch.tensor([[2, 0], [0, 1], [2, 1]]), 3)
    assert groups.pairs.tolist() == [1, 2, 3, 5, 0, 4]
    assert groups.tokens.tolist() == [0, 1, 1, 2, 0, 2]
    assert groups.experts == [0, 1, 2]
    assert groups.counts == [2, 2, 2]
    assert groups.segments == {0: (0, 2), 1: (2, 4), 2: (4, 6)}


class Config:
    hidden_act = "gelu_pytorch_tanh"
    swiglu_alpha = 1.5
    swiglu_limit = 2.0


def test_activations_come_from_the_config() -> None:
    assert gated(Config()).kind == "gelu_tanh"
    assert gated(object()).kind == "silu"
    assert clamped(Config()) == STORES["gpt_oss"][1]


def test_unknown_activation_is_an_error_that_lists_the_known_ones() -> None:
    config = Config()
    config.hidden_act = "quick_gelu"
    with pytest.raises(ValueError, match=r"quick_gelu.*silu"):
        gated(config)


def test_shadows_count_what_other_policies_would_have_hit(tmp_path: Path) -> None:
    """A shadow of the cache's own policy, at its size, hits exactly what the cache hits."""
    store = split_store(tmp_path)
    shadows = LiveShadows(["lru", "lfu"], Capacity.shared(4), 2, E)
    with cached_layers(store, SILU, Capacity.shared(4)) as layers:
        cache = layers.cache
        cache.observers.shadows = shadows
        for seed in range(60):
            layers.run(LAYERS[seed % 2], *routing(1, 2, seed))
        assert cache.observers.shadow_hits["lru"] == cache.counters.num_hits > 0
        before = cache.observers.shadow_hits
        cache.resize(2)
        assert cache.observers.shadow_hits == before
