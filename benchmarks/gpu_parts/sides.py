"""The engine in one of its ways of running, on the GPU or in simulation, and what its steps take.

In simulation a graph is a tape (tests/kernels/gpu/taped_graph.py) and everything is smaller. Knows no checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_parts.lines import device, is_simulated, synchronize

from moe_serve import LLM, SamplingParams
from moe_serve.engine import runner_loading
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.scheduling.sequence import Request

Prompts = Sequence[Sequence[int]]
ALL = {
    "resident, launched": (False, ""),
    "resident, graphs": (True, ""),
    "device cache, graphs": (True, "device"),
    "host cache": (False, "host"),
}
"""Whether steps are captured, and what manages a cache of experts; empty: all experts are resident."""


@dataclass(frozen=True)
class Step:
    """One step of the engine."""

    prompt_tokens: int
    new_tokens: int
    seconds: float


class Side:
    """A loaded engine."""

    def __init__(self, folder: Path, name: str, cache_mib: int, **settings: Any) -> None:
        """`name`: of ALL. `cache_mib`: of experts, where there is a cache; KiB in simulation."""
        graphs, cached_by = ALL[name]
        settings = {"device": str(device()), "enforce_eager": not graphs} | settings
        if cached_by:
            settings |= {"moe_cache_mib": cache_mib, "moe_cache_manager": cached_by}
        self._count = 0
        start = time.perf_counter()
        with _simulation():
            self.llm = LLM(str(folder), **settings)
            self.graphs = self._captured(graphs)
        synchronize()
        self.load_s = time.perf_counter() - start

    def _captured(self, wanted: bool) -> str:
        """Whether steps are captured, and the reason where they are not although they should be."""
        runner = self.llm.engine.runner
        assert isinstance(runner, ModelRunner)
        if wanted and is_simulated() and runner.experts.padding is not None:
            from tests.kernels.gpu.taped_graph import TapedCapture

            runner.capture_decoding(TapedCapture())
        if runner._graphs is not None:
            return f"captured in {runner._graphs.capture_s:.1f} s"
        return (runner_loading._why_no_graphs(runner) or "refused; see the log") if wanted else "not asked for"

    def tokens(self, prompts: Prompts, count: int) -> list[list[int]]:
        """Greedily, `count` for each prompt."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        with _simulation():
            results = self.llm.generate([list(prompt) for prompt in prompts], params)
        return [list(result.completions[0].token_ids) for result in results]

    def steps(self, prompts: Prompts, count: int) -> list[Step]:
        """What each step took until every prompt has `count` tokens."""
        engine, seen = self.llm.engine, _Sizes()
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        for prompt in prompts:
            self._count += 1
            engine.add_request(Request(f"part-{self._count}", tuple(prompt), params, time.monotonic()))
        engine.observer = seen
        found = []
        with _simulation():
            while engine.has_work():
                start = time.perf_counter()
                engine.step()  # which waits for the sampled tokens
                found.append(Step(seen.prompt_tokens, seen.new_tokens, time.perf_counter() - start))
        return found

    def counters(self) -> dict[str, float]:
        """Hits and misses of the cache so far."""
        totals = self.llm.engine.runner.experts.totals()
        return {"hits": totals.hits, "misses": totals.misses, "link_bytes": totals.demand_bytes}

    def close(self) -> None:
        """Ends its threads."""
        self.llm.close()


class _Sizes:
    """A StatsObserver that keeps the tokens of the last step."""

    prompt_tokens = 0
    new_tokens = 0

    def on_step(self, stats: Any) -> None:
        self.prompt_tokens, self.new_tokens = stats.num_prompt_tokens, stats.num_generated_tokens

    def on_load(self, load: Any) -> None:
        """Only steps are of interest."""

    def on_finished(self, stats: Any) -> None:
        """Only steps are of interest."""

    def on_aborted(self, num_samples: int) -> None:
        """Only steps are of interest."""


def _simulation() -> ExitStack:
    """On a CPU: a GPU's attention and products, few copying programs, a cache's budget in KiB, one size of graph."""
    stack = ExitStack()
    if is_simulated():
        patches: dict[str, Any] = {
            "moe_serve_kernels.cpu.paged_attention.is_available": lambda device, dtype: False,
            "moe_serve.hf.fixed_order.is_available": lambda device, dtype: False,
            "moe_serve_kernels.gpu.residency.COPY_PROGRAMS": 2,
            "moe_serve.resolve.MIB": 1 << 10,
            "expert_cache.simulation.capacity.MIB": 1 << 10,
            "moe_serve.engine.model_runner.sizes_up_to": lambda limit: [limit],
        }
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
    return stack
