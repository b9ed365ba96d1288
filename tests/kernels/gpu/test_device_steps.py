"""Steps of few launches give the logits of the model's own modules: each family's, prompts and decoding in one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_serve import LLM
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution import forward_batch
from moe_serve.hf import family
from moe_serve.hf.device_steps import DeviceSteps
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve_kernels.cpu import paged_attention

from ...families.tiny_configs import CASES, VOCAB

CLIPPED = "olmoe_clipped"
"""Its queries and keys are clipped, so it runs module by module."""
PLAIN = [
    name
    for name, case in CASES.items()
    if family.find(case.config().model_type.removesuffix("_thinker")).plain_layers and name != CLIPPED
]
QUICK = {"gpt_oss"}
"""Biases, sinks and windows."""
PAGE_SIZE = 4


@pytest.fixture(autouse=True)
def _attention_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "is_available", lambda device, dtype: False)


def sequences() -> list[Any]:
    """Of 6, 5 and 2 tokens, on pages in no order."""
    generator = torch.Generator().manual_seed(3)
    pages = [[4, 1], [0, 5], [2]]
    return [
        SimpleNamespace(
            token_ids=torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist(),
            page_ids=own,
            num_tokens=length,
            num_unscored=0,
            seat=-1,
        )
        for length, own in zip((6, 5, 2), pages, strict=True)
    ]


def plans() -> list[BatchPlan]:
    """Parts of two prompts; then one of these decodes, the other goes on, and a third prompt begins."""
    first, second, third = sequences()
    return [
        BatchPlan((ScheduledSequence(first, 0, 5), ScheduledSequence(second, 0, 3))),
        BatchPlan((ScheduledSequence(first, 5, 1), ScheduledSequence(second, 3, 2), ScheduledSequence(third, 0, 2))),
    ]


def run_experts(
    layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Any = None
) -> Any:
    """In the place of the experts: cheap, and different for every choice and weight."""
    if meanwhile is not None:
        meanwhile()
    return hidden * ((ids + 1) * weights).sum(1, keepdim=True).to(hidden.dtype)


@torch.inference_mode()
def logits_of(runner: ModelRunner) -> list[torch.Tensor]:
    """Of every token of both steps."""
    found = []
    for plan in plans():
        batch = forward_batch.make(plan, PAGE_SIZE, runner.device, runner._group_limits)
        rows = torch.arange(batch.num_tokens, device=runner.device)
        found.append(runner._forward(batch, rows.tolist())[len(batch.sample_rows) :])
    return found


@pytest.mark.parametrize("case", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PLAIN])
def test_logits_are_those_of_the_modules(
    device: torch.device, folders: Callable[[str], Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_model_len": 8, "num_kv_pages": 8}
    llm = LLM(str(folders(case)), device=str(device), page_size=PAGE_SIZE, **settings)
    runner = llm.engine.runner
    assert isinstance(runner, ModelRunner)
    monkeypatch.setattr(runner.experts, "run", run_experts)
    assert isinstance(runner._whole_steps, DeviceSteps)
    got = logits_of(runner)
    runner._whole_steps = None
    for mine, expected in zip(got, logits_of(runner), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-4)
    llm.close()
