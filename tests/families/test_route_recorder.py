"""Recorded routes are those of transformers' own routers, token by token, however the engine batched them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_serve import LLM
from moe_serve.errors import InvalidRequestError
from moe_serve.expert_routes.route_recorder import RouteRecorder
from predictors import trace
from predictors.trace import RoutingTrace

from .references import Reference, record_routes
from .serving import StepLog, greedy, load

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]
FEW_PAGES = {"block_size": 4, "num_kv_pages": 24, "enable_prefix_caching": False}


def recorded(llm: LLM, ref: Reference, num_tokens: int = 1000, weights: bool = False) -> RoutingTrace:
    recorder = RouteRecorder(llm.engine.routing_shape(), num_tokens, weights)
    llm.engine.observe_routes(recorder)
    greedy(llm, ref.prompts)
    llm.engine.observe_routes(recorder, wanted=False)
    return recorder.trace({"model": "tiny"})


def by_request(found: RoutingTrace) -> list[np.ndarray]:
    """[T, L, K] of each request, in the order of their submission."""
    rows = dict(zip(found.meta["requests"], found.sequence_slices(), strict=True))
    return [found.ids[rows[name]] for name in sorted(rows, key=lambda name: int(name[4:].removesuffix("[0]")))]


CHUNKS = {"max_num_batched_tokens": 13, "enable_prefix_caching": False}


@pytest.mark.parametrize(
    ("case", "settings"), [("mixtral", CHUNKS), ("mixtral", FEW_PAGES), ("deepseek_v2", FEW_PAGES), ("gpt_oss", CHUNKS)]
)
def test_every_token_once_as_transformers_routes_it(
    case: str, settings: dict[str, Any], checkpoint: Checkpoint, reference: References
) -> None:
    ref = reference(case)
    llm = load(checkpoint(case), **settings)
    log = StepLog(llm)
    found = recorded(llm, ref)
    assert (log.num_preemptions > 0) == (settings is FEW_PAGES)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(case), dtype=torch.float32, experts_implementation="eager")
    for prompt, output, ids in zip(ref.prompts, ref.outputs, by_request(found), strict=True):
        want = torch.stack(record_routes(model, (*prompt, *output[:-1])), dim=1).numpy()
        np.testing.assert_array_equal(np.sort(ids, axis=2), np.sort(want, axis=2))
    assert found.meta["first_positions"] == [0] * len(ref.prompts)
    assert llm.engine.runner.experts.routes.is_on is False  # type: ignore[attr-defined]


def test_what_the_prefix_cache_gave_has_no_row(checkpoint: Checkpoint, reference: References) -> None:
    ref = reference("mixtral")
    llm = load(checkpoint("mixtral"), block_size=16)
    first, second = recorded(llm, ref), recorded(llm, ref)
    assert second.num_tokens < first.num_tokens
    longest = second.meta["first_positions"][-1]
    assert longest == 64
    np.testing.assert_array_equal(by_request(second)[-1], by_request(first)[-1][-len(by_request(second)[-1]) :])


def test_the_ring_keeps_the_newest_and_the_file_loads(
    checkpoint: Checkpoint, reference: References, tmp_path: Path
) -> None:
    ref = reference("mixtral")
    llm = load(checkpoint("mixtral"), enable_prefix_caching=False)
    everything, newest = recorded(llm, ref, weights=True), recorded(llm, ref, num_tokens=50)
    assert newest.num_tokens == 50
    last, whole = by_request(newest)[-1], by_request(everything)[-1]
    np.testing.assert_array_equal(last, whole[-len(last) :])
    everything.save(tmp_path / "trace.npz")
    loaded = trace.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(loaded.ids, everything.ids)
    assert loaded.weights is not None
    np.testing.assert_allclose(loaded.weights.sum(axis=2), 1, atol=2e-3)


def test_an_empty_recording_is_refused(checkpoint: Checkpoint) -> None:
    recorder = RouteRecorder(load(checkpoint("mixtral")).engine.routing_shape(), 10)
    with pytest.raises(InvalidRequestError, match="nothing was recorded"):
        recorder.trace({})
