"""The three contenders of bench_engine.py, each with `run(prompts, new_tokens) -> RunResult`.

All are measured by a StepClock, marked where a forward pass begins: for transformers by a hook on
the model, for moe-serve around `Engine.step`. Greedy, no end-of-sequence token, same prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import StepClock
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from moe_serve import LLM, SamplingParams
from moe_serve.scheduling.sequence import Request

EXPERT_IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
"""transformers' CPU implementations; the first is its default."""
CLEARLY_FASTER = 0.97
"""A step must take at most this fraction of the default's time; less is noise."""
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class RunResult:
    """Generated tokens per prompt, in order, and when the steps ran."""

    tokens: list[tuple[int, ...]]
    clock: StepClock


class MoEServe:
    """Our engine with its default settings, or others."""

    def __init__(self, model: str, dtype: str, threads: int, max_len: int, max_seqs: int, **settings: Any) -> None:
        limits = {"max_model_len": max_len, "max_num_seqs": max_seqs}
        self._llm = LLM(model, dtype=dtype, num_threads=threads, **limits, **settings)
        self._count = 0

    @property
    def experts(self) -> Any:
        """What runs its experts, with counters."""
        return self._llm.engine.runner.experts

    def close(self) -> None:
        """Stop its threads."""
        self._llm.close()

    def run(self, prompts: Prompts, new_tokens: int) -> RunResult:
        engine = self._llm.engine
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        tokens: dict[str, list[int]] = {}
        for prompt in prompts:
            self._count += 1
            tokens[f"bench-{self._count}"] = []
            engine.add_request(Request(f"bench-{self._count}", tuple(prompt), params, time.monotonic()))
        clock = StepClock()
        engine.observer = _PlanSizes()
        while engine.has_work():
            clock.mark(0)
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
            clock.relabel_last(engine.observer.num_tokens)
        clock.mark(0)
        return RunResult([tuple(t) for t in tokens.values()], clock)


class _PlanSizes:
    """A StatsObserver: how many tokens the last step computed, or 0 if it held part of a prompt."""

    num_tokens = 0

    def on_step(self, stats: Any) -> None:
        self.num_tokens = 0 if stats.num_prompt_tokens else stats.num_generated_tokens

    def on_load(self, load: Any) -> None:
        """Only steps are of interest."""

    def on_finished(self, stats: Any) -> None:
        """Only steps are of interest."""

    def on_aborted(self, num_samples: int) -> None:
        """Only steps are of interest."""


class HFModel:
    """The transformers model both of its sides share, and the clock hooked into it.

    `decode_experts` is the experts implementation of decode steps; prompts always run with the
    default, because batched_mm would copy two experts' weights per prompt token.
    """

    def __init__(self, model: str, dtype: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.model.config.eos_token_id = None
        self.clock = StepClock()
        self.batch = 0
        self.decode_experts: Sequence[str] = EXPERT_IMPLEMENTATIONS[:1]
        self._num_decodes = 0
        self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def reset(self, batch: int) -> None:
        """A new run of `batch` sequences begins."""
        self.clock, self.batch, self._num_decodes = StepClock(), batch, 0

    def _before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        num_tokens = kwargs["input_ids"].numel()
        name = EXPERT_IMPLEMENTATIONS[0]
        if num_tokens == self.batch:
            name = self.decode_experts[self._num_decodes % len(self.decode_experts)]
            self._num_decodes += 1
        self.model.set_experts_implementation(name)
        self.clock.mark(num_tokens)

    def best_experts(
        self, prompts: Prompts, names: Sequence[str] = EXPERT_IMPLEMENTATIONS, rounds: int = 6
    ) -> tuple[str, dict[str, float]]:
        """The fastest implementation for decoding these prompts, and ms of CPU per step of each.

        One run that changes the implementation from step to step: least of `rounds` steps each.
        """
        if len(names) == 1:
            return names[0], {}
        self.decode_experts = names
        clock = StaticBatch(self).run(prompts, 1 + rounds * len(names)).clock
        times = clock.cpu_times_s(len(prompts))
        self.decode_experts = EXPERT_IMPLEMENTATIONS[:1]
        step_ms = {name: 1e3 * min(times[i :: len(names)]) for i, name in enumerate(names)}
        best = min(step_ms, key=lambda name: step_ms[name])
        is_clear = step_ms[best] < CLEARLY_FASTER * step_ms[names[0]]
        return best if is_clear else names[0], step_ms


class StaticBatch:
    """`model.generate` on the whole batch, prompts of equal length, so without padding."""

    def __init__(self, hf: HFModel) -> None:
        self._hf = hf

    def run(self, prompts: Prompts, new_tokens: int) -> RunResult:
        self._hf.reset(len(prompts))
        ids = torch.tensor([list(p) for p in prompts])
        out = self._hf.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
        self._hf.clock.mark(0)
        return RunResult([tuple(row) for row in out[:, ids.shape[1] :].tolist()], self._hf.clock)


class ContinuousBatch:
    """transformers' continuous batching, on one manager that stays up, so that set-up costs nothing here.

    The same token budget per step as ours, and room for every request at once.
    """

    PAGE = 256
    STEP_TOKENS = 2048

    def __init__(self, hf: HFModel, max_len: int, max_seqs: int) -> None:
        self._hf = hf
        config = ContinuousBatchingConfig(
            page_size=self.PAGE,
            # Twice what is needed: its scheduler admits no prompt when few blocks are free.
            num_blocks=2 * max_seqs * -(-max_len // self.PAGE) + 8,
            max_batch_tokens=self.STEP_TOKENS,
            max_requests_per_batch=max_seqs,
        )
        self._manager = hf.model.init_continuous_batching(continuous_batching_config=config)
        self._manager.start()

    def run(self, prompts: Prompts, new_tokens: int) -> RunResult:
        self._hf.reset(len(prompts))
        ids = self._manager.add_requests([list(p) for p in prompts], max_new_tokens=new_tokens)
        tokens: dict[str, tuple[int, ...]] = {}
        while len(tokens) < len(prompts):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens[result.request_id] = tuple(result.generated_tokens)
            elif not self._manager.is_running():
                raise RuntimeError("the continuous batching thread has stopped")
        self._hf.clock.mark(0)
        return RunResult([tokens[i] for i in ids], self._hf.clock)

    def close(self) -> None:
        """End the manager's thread."""
        self._manager.stop(block=True, timeout=10)
