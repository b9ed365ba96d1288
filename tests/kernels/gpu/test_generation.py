"""The engine end to end on the GPU kernels: in float32, the tokens of transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from expert_cache.gpu_managed.cache import GpuManagedExperts
from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.experts import ResidentExperts
from expert_cache.host_compute.crossover import MissCosts
from expert_cache.host_compute.miss_choice import ByCrossover
from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.running.local_experts import LocalExperts
from moe_serve import LLM, SamplingParams
from moe_serve_kernels.cpu import paged_attention

from ...families.quantized_checkpoints import write_mxfp4_pair
from ...families.tiny_configs import VOCAB

NEW_TOKENS = 3
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v2"]
"""The plain one; biases, sinks, windows and the clamped activation; keys wider than values and a dense layer."""
ROOMS = ["for all", "for some, by the device", "for some, by the host"]


def expected(folder: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    done = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return [int(token) for token in done[0, len(prompt) :]]


def experts_of(llm: LLM) -> LocalExperts[Any]:
    """The experts of this process."""
    experts = llm.engine.runner.experts
    assert isinstance(experts, LocalExperts)
    return experts


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(
    device: torch.device, folders: Callable[[str], Path], family: str, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "is_available", lambda device, dtype: False)
    prompt = torch.randint(0, VOCAB - 1, (9,)).tolist()
    llm = LLM(
        str(folders(family)),
        dtype="float32",
        device=str(device),
        num_threads=1,
        max_model_len=64,
        num_kv_pages=16,
        moe_cache_mib=None if room == "for all" else 1,
        moe_cache_manager="host" if room.endswith("host") else "auto",
    )
    experts = experts_of(llm)
    assert isinstance(experts.compute, GpuCompute)
    kinds = {
        "for all": ResidentExperts,
        "for some, by the device": GpuManagedExperts,
        "for some, by the host": HostManagedExperts,
    }
    assert isinstance(experts, kinds[room])
    result = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True))
    assert list(result[0].completions[0].token_ids) == expected(folders(family), prompt)
    llm.close()


@pytest.mark.slow
def test_codes_give_the_tokens_of_their_floats(
    device: torch.device, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MXFP4 codes in slots, and a checkpoint with the bf16 numbers that they stand for."""
    monkeypatch.setattr(paged_attention, "is_available", lambda device, dtype: False)
    prompt = torch.randint(0, VOCAB - 1, (9,)).tolist()
    tokens = {}
    for folder, format in zip(write_mxfp4_pair(folders("gpt_oss"), tmp_path), ("mxfp4", "plain"), strict=True):
        llm = LLM(str(folder), dtype="bfloat16", device=str(device), num_threads=1, max_model_len=64, num_kv_pages=16)
        compute = experts_of(llm).compute
        assert isinstance(compute, GpuCompute)
        assert compute.pool.experts.format == format
        result = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True))
        tokens[format] = result[0].completions[0].token_ids
        llm.close()
    assert tokens["mxfp4"] == tokens["plain"]


def test_the_cpu_computes_misses_beside_the_gpu(
    device: torch.device, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated at the start, then told that the CPU takes no time: all misses of steps that do not stream."""
    monkeypatch.setattr(paged_attention, "is_available", lambda device, dtype: False)
    prompt = torch.randint(0, VOCAB - 1, (3,)).tolist()
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": str(device),
        "num_threads": 1,
        "max_model_len": 64,
        "num_kv_pages": 16,
    }
    llm = LLM(str(folders("mixtral")), moe_cache_mib=1, moe_cpu_misses=True, **settings)
    experts = llm.engine.runner.experts
    assert isinstance(experts, HostManagedExperts)
    assert isinstance(experts.cache.acquirer.misses, ByCrossover)
    assert experts.cache.acquirer.misses.costs.copy_s > 0
    experts.cache.acquirer.misses = ByCrossover(MissCosts(1.0, (1, 2), (0.0, 0.0)))
    result = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True))
    assert experts.counters.host_runs.sum() > 0
    assert list(result[0].completions[0].token_ids) == expected(folders("mixtral"), prompt)
    llm.close()
