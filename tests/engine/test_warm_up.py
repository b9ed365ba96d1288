"""Every tile that a step can choose is chosen in the warm-up, and a step that does not fit is told at once."""

from __future__ import annotations

import pytest
import torch

from moe_serve.engine.warm_up import plan_of, sizes_up_to, warm_up
from moe_serve.errors import ConfigError
from moe_serve.scheduling.batch_plan import BatchPlan

LARGEST, PAGE_SIZE = 2048, 16
SHAPES = {"mixtral": (8, 2), "qwen3_moe": (128, 8), "gpt_oss": (32, 4), "deepseek_v2": (64, 6), "deepseek_v3": (256, 8)}
"""Experts and choices."""


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_all_tiles_are_met(model: str, arch: int) -> None:
    configs = pytest.importorskip("moe_serve_kernels.gpu.configs")
    gpu_model = pytest.importorskip("moe_serve_kernels.gpu.gpu_model")
    experts, top_k = SHAPES[model]

    def chosen(sizes: range | list[int]) -> set[str]:
        gpu = gpu_model.known(arch)
        return {
            f"{format} {configs.choose(gpu, format, num_tokens, top_k, experts)}"
            for format in ("plain", "int8", "fp8", "int4")
            for num_tokens in sizes
        }

    assert chosen(sizes_up_to(LARGEST)) == chosen(range(1, LARGEST + 1))


def test_prompts_of_every_size_in_pages_that_there_are() -> None:
    plans: list[BatchPlan] = []
    warm_up(plans.append, 21, PAGE_SIZE)
    runs = [plan.scheduled[0] for plan in plans]
    assert [run.count for run in runs] == [1, 2, 4, 8, 16, 21]
    assert list(runs[-1].seq.page_ids) == [0, 1]
    assert all(run.start == 0 and run.needs_sample for run in runs)
    assert sizes_up_to(16) == [1, 2, 4, 8, 16]


def test_a_step_that_does_not_fit_names_the_flags() -> None:
    def run(plan: BatchPlan) -> None:
        if plan.scheduled[0].count == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ConfigError, match=r"a step of 4 tokens .* --max-num-batched-tokens"):
        warm_up(run, 8, PAGE_SIZE)


def test_a_prompt_has_the_tokens_it_says() -> None:
    (run,) = plan_of(17, PAGE_SIZE).scheduled
    assert len(run.seq.token_ids) == run.count == 17
