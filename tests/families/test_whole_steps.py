"""Decoding steps in one kernel call: which families take them, and that counts, routes and tokens are the modules'."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve import LLM, SamplingParams
from moe_serve.hf.family import find
from moe_serve.hf.whole_steps import WholeSteps
from moe_serve_kernels.cpu import library

from .references import Reference
from .serving import experts_of, greedy, host_managed, load, runner_of, tokens
from .tiny_configs import CASES

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]
CLIPPED = {name for name, case in CASES.items() if getattr(case.config(), "clip_qkv", None)}
"""Not plain whatever the family: their attention limits queries, keys and values."""
PLAIN = {
    name for name, case in CASES.items() if find(case.config().model_type.removesuffix("_thinker")).plain_layers
} - CLIPPED


def whole_steps_of(llm: LLM) -> WholeSteps | None:
    steps = runner_of(llm)._whole_steps
    assert steps is None or isinstance(steps, WholeSteps)
    return steps


class Calls:
    """Counts the steps that the kernel runs at once, and those that it runs layer by layer."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at_once = self.by_layer = 0
        steps = whole_steps_of(llm)
        assert steps is not None
        for name in ("at_once", "by_layer"):
            monkeypatch.setattr(steps, f"_run_{name}", self._counting(name, getattr(steps, f"_run_{name}")))

    def _counting(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return run(*arguments)

        return counting


@pytest.mark.spanning
@pytest.mark.parametrize("case", CASES)
def test_plain_families_take_them(case: str, checkpoint: Checkpoint) -> None:
    assert (whole_steps_of(load(checkpoint(case))) is not None) == (case in PLAIN)


def test_others_say_why(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "moe_serve"):
        load(checkpoint("phimoe"))
    assert re.search("module by module, not kernel by kernel, because phimoe's layers are not plain", caplog.text)


@pytest.mark.parametrize("settings", [{"enforce_eager": True}, {"dtype": "float16"}], ids=str)
def test_they_can_be_turned_off(settings: dict[str, Any], checkpoint: Checkpoint) -> None:
    assert whole_steps_of(load(checkpoint("mixtral"), **settings)) is None


@pytest.mark.spanning
@pytest.mark.parametrize("case", sorted(PLAIN))
def test_counts_and_routes_are_those_of_the_modules(
    case: str, checkpoint: Checkpoint, reference: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = reference(case).prompts[:3]
    seen = []
    for eager in (True, False):
        llm = load(checkpoint(case), enforce_eager=eager)
        calls = None if eager else Calls(llm, monkeypatch)
        llm.engine.runner.observe_routes(True, weights=True)
        routes: list[Any] = []
        run = llm.engine.runner.run
        monkeypatch.setattr(llm.engine.runner, "run", lambda plan, run=run, to=routes: _keep(run(plan), to))
        greedy(llm, prompts)
        report = experts_of(llm).report()
        seen.append((routes, report.tokens, report.counts["hits"]))
        assert calls is None or calls.at_once + calls.by_layer > 0  # GPT-OSS stores experts by columns: none in place
    (eager_routes, eager_tokens, eager_hits), (routes, counted, hits) = seen
    assert len(routes) == len(eager_routes)
    for ours, modules in zip(map(by_expert, routes), map(by_expert, eager_routes), strict=True):
        assert np.array_equal(ours[0], modules[0])
        np.testing.assert_allclose(ours[1], modules[1], atol=1e-5)
    assert np.array_equal(counted, eager_tokens)
    assert np.array_equal(hits, eager_hits)


def by_expert(routes: Any) -> tuple[Any, Any]:
    """Ids and weights with each token's experts in ascending order: some families promise none."""
    order = np.argsort(routes.ids, axis=-1)
    return np.take_along_axis(routes.ids, order, axis=-1), np.take_along_axis(routes.weights, order, axis=-1)


def _keep(result: Any, routes: list[Any]) -> Any:
    routes.append(result.routes)
    return result


def test_a_cache_that_fills_and_is_resized(
    checkpoint: Checkpoint, reference: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer with room for half of the experts, at once when all have come, and back."""
    ref = reference("qwen3_moe")
    llm = load(checkpoint("qwen3_moe"), moe_cache_mib=64)
    cache = host_managed(llm).cache
    calls = Calls(llm, monkeypatch)
    for room in (cache.store.num_total // 2, cache.arena.num_slots, cache.store.num_total // 2):
        cache.resize(room)
        for _ in range(3):
            calls.at_once = calls.by_layer = 0
            assert tokens(greedy(llm, ref.prompts)) == ref.outputs
        has_all = room == cache.arena.num_slots
        assert (calls.at_once > 0) == has_all
        assert (calls.by_layer > 0) == (not has_all)
    llm.close()


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_bfloat16_is_as_near_to_float32_as_modules_are(
    case: str, checkpoint: Checkpoint, reference: References
) -> None:
    """Log-probabilities of prompts, whose spread is 1.5 to 1.8. Whole steps keep the residual stream in float32, the
    modules round it; either may choose another expert where two are close."""

    def scores(**settings: Any) -> Any:
        llm = load(checkpoint(case), **settings)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        results = llm.generate(reference(case).prompts, params)
        return np.array([entry.logprob for result in results for entry in result.prompt_logprobs])

    exact = scores()
    ours = np.abs(scores(dtype="bfloat16") - exact)
    modules = np.abs(scores(dtype="bfloat16", enforce_eager=True) - exact)
    assert 0 < ours.mean() <= 1.1 * modules.mean()
    assert ours.mean() < 0.1
