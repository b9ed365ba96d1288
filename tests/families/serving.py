"""Running moe_serve on a tiny checkpoint: settings, greedy requests and a count of preemptions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.running.local_experts import LocalExperts
from moe_serve import LLM, SamplingParams
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.hf import loading
from moe_serve.hf.config_file import read_config
from moe_serve.llm import RequestResult
from moe_serve.scheduling.finish import FinishedStats
from moe_serve.scheduling.stats import EngineLoad, StepStats
from moe_serve.spec import ModelSpec

from .references import NEW_TOKENS
from .tiny_configs import POSITIONS

SMALL_ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "max_model_len": POSITIONS,
    "max_num_seqs": 8,
    "num_kv_pages": 128,
}
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


load_model = loading.load  # before anything replaces it


@cache
def _loaded(folder: str, dtype: torch.dtype, expert_file: str | None) -> loading.LoadedModel:
    hf_config = read_config(folder)
    return load_model(folder, hf_config, ModelSpec.from_hf(hf_config), dtype, torch.device("cpu"), expert_file)


def _load_once(
    folder: str, _config: Any, _spec: ModelSpec, dtype: torch.dtype, _device: torch.device, expert_file: str | None
) -> loading.LoadedModel:
    return _loaded(folder, dtype, expert_file)


def load(folder: Path, **settings: Any) -> LLM:
    """An LLM with a KV cache small enough to build in no time.

    The dense model is shared by all LLMs of a folder, a dtype and an expert file, because transformers takes a second
    to load it; so use only the newest of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", _load_once)
        return LLM(str(folder), **{**SMALL_ENGINE, **settings})


def experts_of(llm: LLM) -> LocalExperts[Any]:
    """What runs the model's experts."""
    experts = runner_of(llm).experts
    assert isinstance(experts, LocalExperts)
    return experts


def host_managed(llm: LLM) -> HostManagedExperts[Any]:
    """The same, where it is a cache that the host manages."""
    experts = runner_of(llm).experts
    assert isinstance(experts, HostManagedExperts)
    return experts


def greedy(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[RequestResult]:
    """Complete all prompts together, then prove that nothing is left behind."""
    results = llm.generate(prompts, GREEDY)
    llm.engine.check_integrity()
    experts_of(llm).check_integrity()
    assert llm.engine.pool.num_free == llm.engine.num_pages
    return results


def runner_of(llm: LLM) -> ModelRunner:
    """The real runner behind an LLM."""
    runner = llm.engine.runner
    assert isinstance(runner, ModelRunner)
    return runner


def tokens(results: Sequence[RequestResult]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each result's only sample."""
    return tuple(tuple(r.completions[0].token_ids) for r in results)


class StepLog:
    """A StatsObserver that keeps every step's numbers."""

    def __init__(self, llm: LLM) -> None:
        self.steps: list[StepStats] = []
        llm.engine.observer = self

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_load(self, load: EngineLoad) -> None:
        """Only steps are of interest."""

    def on_finished(self, stats: FinishedStats) -> None:
        """Only steps are of interest."""

    def on_aborted(self, num_samples: int) -> None:
        """Only steps are of interest."""

    @property
    def num_preemptions(self) -> int:
        return sum(s.num_preemptions for s in self.steps)

    @property
    def most_prompt_tokens(self) -> int:
        """Prompt tokens of the largest step."""
        return max(s.num_prompt_tokens for s in self.steps)

    @property
    def expert_hits(self) -> int:
        return sum(int(s.experts.hits) for s in self.steps)

    @property
    def expert_misses(self) -> int:
        return sum(int(s.experts.misses) for s in self.steps)
