"""The engine with decoding steps captured: on a GPU as CUDA graphs, here as tapes (taped_graph.py).

Captured or not, all experts in slots or some, the tokens are those of the engine that launches everything itself.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from expert_cache.device_cache import DeviceCache
from expert_cache.resident import ResidentExperts
from moe_serve import LLM, SamplingParams
from moe_serve.cuda_graph import CudaCapture
from moe_serve.hf.family import supported
from moe_serve_kernels.cpu import paged_attention

from ...families.tiny_checkpoints import write_checkpoint
from ...families.tiny_configs import CASES, VOCAB

if not torch.cuda.is_available():
    from .taped_graph import TapedCapture

LENGTHS = (5, 17, 9)
NEW_TOKENS = 4
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def folder(family: str) -> Path:
        return write_checkpoint(CASES[family], tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture(autouse=True)
def _attention_of_the_gpu(monkeypatch) -> None:
    monkeypatch.setattr(paged_attention, "is_available", lambda device, dtype: False)


def load(folder: Path, device: torch.device, **settings) -> LLM:
    fixed = {"dtype": "float32", "num_threads": 1, "max_model_len": 64, "num_kv_pages": 16, "max_num_seqs": 4}
    return LLM(str(folder), device=str(device), enforce_eager=True, **fixed, **settings)


def capture(llm: LLM, device: torch.device):
    capture = TapedCapture() if device.type == "cpu" else CudaCapture(device)
    llm.engine.runner.capture_decoding(capture)
    return capture


def prompts(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB - 1, (n,), generator=generator).tolist() for n in lengths]


def tokens(llm: LLM, lengths=LENGTHS) -> list[list[int]]:
    results = llm.generate(prompts(lengths), GREEDY)
    return [list(result.completions[0].token_ids) for result in results]


@pytest.mark.parametrize("room", ["for all", "for some"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_captured_steps_give_the_tokens_of_launched_ones(device, folders, family, room) -> None:
    """Three sequences in a graph for four, then two, then one, the lengths growing meanwhile."""
    settings = {} if room == "for all" else {"moe_cache_mib": 1}
    kind = ResidentExperts if room == "for all" else DeviceCache
    launched, captured = (load(folders(family), device, **settings) for _ in range(2))
    assert isinstance(captured.engine.runner.expert_layers.experts, kind)
    recorded = capture(captured, device)
    assert tokens(captured) == tokens(launched)
    if device.type == "cpu":
        assert recorded.num_captures == 3
        assert recorded.num_replays >= NEW_TOKENS - 1
    launched.close()
    captured.close()


def test_padding_touches_no_expert(device, folders, monkeypatch) -> None:
    """A sequence alone in a graph for four: the same hits, copies and evictions, and the same slots."""
    monkeypatch.setattr("moe_serve.model_runner.sizes_up_to", lambda limit: [4])
    launched, captured = (load(folders("mixtral"), device, moe_cache_mib=1) for _ in range(2))
    capture(captured, device)
    assert tokens(captured, [5]) == tokens(launched, [5])
    sides = [llm.engine.runner.expert_layers.experts for llm in (launched, captured)]
    for name in ("slot_of", "owner_of", "totals"):
        one, other = (getattr(side._layers.state, name) for side in sides)
        assert torch.equal(one, other), name
    for llm, side in zip((launched, captured), sides, strict=True):
        side.check_integrity()
        report = llm.engine.runner.expert_report()
        assert report.counts["misses"].sum() > 0
        assert report.residency.ready.sum() == report.counts["misses"].sum() - report.counts["evictions"].sum()
        llm.close()


def test_cached_by_the_device_or_by_the_host(device, folders) -> None:
    by_device, by_host = (
        load(folders("mixtral"), device, moe_cache_mib=1, moe_cache_manager=manager) for manager in ("device", "host")
    )
    assert tokens(by_device) == tokens(by_host)
    by_device.close()
    by_host.close()


@pytest.mark.parametrize("family", supported())
def test_every_family_can_be_captured(device, folders, family, monkeypatch) -> None:
    """Nothing between the embedding and the logits asks the device for a value."""
    monkeypatch.setattr("moe_serve.model_runner.sizes_up_to", lambda limit: [1])
    llm = load(folders(family), device)
    capture(llm, device)
    llm.close()


def test_routes_are_seen_although_steps_are_captured(device, folders) -> None:
    """Recording runs steps one operation at a time for as long as it lasts."""
    llm = load(folders("mixtral"), device)
    recorded = capture(llm, device)
    llm.engine.runner.watch_routes(True)
    found = tokens(llm, [5])
    llm.engine.runner.watch_routes(False)
    if device.type == "cpu":
        assert recorded.num_replays == 0
    assert tokens(llm, [5]) == found
    llm.close()
