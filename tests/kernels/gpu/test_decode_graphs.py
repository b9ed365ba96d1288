"""The engine with decoding steps captured: on a GPU as CUDA graphs, here as tapes (taped_graph.py).

Captured or not, all experts in slots or some, the tokens are those of the engine that launches everything itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cache.gpu_managed.cache import GpuManagedExperts
from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.experts import ResidentExperts
from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.running.local_experts import LocalExperts
from moe_serve import LLM, SamplingParams
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution.cuda_graph import CudaCapture
from moe_serve.hf.families import family_names
from moe_serve.hf.family import find
from moe_serve.quantization.writing import write_quantized
from moe_serve_kernels.cpu import paged_attention

from ...families.tiny_checkpoints import write_checkpoint
from ...families.tiny_configs import CASES, VOCAB, TinyCase

if not torch.cuda.is_available():
    from .taped_graph import TapedCapture

TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_hidden_layers": 2}
SMALL = {
    "mixtral": TinyCase("mixtral", TINY | {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "gpt_oss": TinyCase("gpt_oss", dict(CASES["gpt_oss"].fields) | TINY),
}
"""Smaller than the smallest: a program of the interpreter takes ten milliseconds."""
LENGTHS = (2, 5, 3)
KIB = 80
"""Of experts of 13 KiB and more."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def folder(family: str) -> Path:
        return write_checkpoint(SMALL[family], tmp_path_factory.mktemp(family))

    return folder


@pytest.fixture(autouse=True)
def _cache_memory_in_kib(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a budget can hold a part of these models."""
    monkeypatch.setattr("moe_serve.resolve.MIB", 1 << 10)
    monkeypatch.setattr("expert_cache.simulation.capacity.MIB", 1 << 10)


@pytest.fixture(autouse=True)
def _attention_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "is_available", lambda device, dtype: False)


def load(folder: Path, device: torch.device, **settings: Any) -> LLM:
    fixed: dict[str, Any] = {
        "dtype": "float32",
        "num_threads": 1,
        "max_model_len": 64,
        "num_kv_pages": 16,
        "max_num_seqs": 4,
    }
    return LLM(str(folder), device=str(device), enforce_eager=True, **fixed | settings)


def experts_of(llm: LLM) -> LocalExperts[Any]:
    """The experts of this process."""
    experts = llm.engine.runner.experts
    assert isinstance(experts, LocalExperts)
    return experts


def capture(llm: LLM, device: torch.device) -> Any:
    """A CudaCapture, or a TapedCapture, which is imported only where there is no GPU."""
    capture: Any = TapedCapture() if device.type == "cpu" else CudaCapture(device)
    assert isinstance(llm.engine.runner, ModelRunner)
    llm.engine.runner.capture_decoding(capture)
    return capture


def managed_by_gpu(llm: LLM) -> GpuManagedExperts:
    experts = experts_of(llm)
    assert isinstance(experts, GpuManagedExperts)
    return experts


def format_of(llm: LLM) -> str:
    """How the slots hold the experts' weights."""
    compute = experts_of(llm).compute
    assert isinstance(compute, GpuCompute)
    return compute.pool.layout.format


def tokens(llm: LLM, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Greedily, two tokens for the first prompt and one more for each other."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, VOCAB - 1, (n,), generator=generator).tolist() for n in lengths]
    params = [SamplingParams(temperature=0, max_tokens=2 + i, ignore_eos=True) for i in range(len(lengths))]
    return [list(result.completions[0].token_ids) for result in llm.generate(prompts, params)]


@pytest.fixture(autouse=True)
def _few_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy takes as long in the interpreter as it has programs."""
    if device.type == "cpu":
        monkeypatch.setattr("moe_serve_kernels.gpu.residency.COPY_PROGRAMS", 2)


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is padded to four."""
    monkeypatch.setattr("moe_serve.engine.model_runner.sizes_up_to", lambda limit: [4])


@pytest.mark.parametrize(
    ("family", "room"),
    [
        pytest.param("mixtral", "for some", marks=pytest.mark.slow),
        pytest.param("mixtral", "for all", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "for some", marks=pytest.mark.slow),
    ],
)
def test_captured_steps_give_the_tokens_of_launched_ones(
    device: torch.device, small: Callable[[str], Path], one_size: None, family: str, room: str
) -> None:
    """Three sequences in a graph for four, then two, then one, the contexts growing meanwhile."""
    settings: dict[str, Any] = {} if room == "for all" else {"moe_cache_mib": KIB}
    launched, captured = (load(small(family), device, **settings) for _ in range(2))
    kind = ResidentExperts if room == "for all" else GpuManagedExperts
    assert isinstance(captured.engine.runner.experts, kind)
    recorded = capture(captured, device)
    assert tokens(captured) == tokens(launched)
    if device.type == "cpu":
        assert (recorded.num_captures, recorded.num_replays) == (1, 3)
    launched.close()
    captured.close()


@pytest.mark.slow
def test_padding_touches_no_expert(device: torch.device, small: Callable[[str], Path], one_size: None) -> None:
    """A sequence alone in a graph for four: the same hits, copies and evictions, and the same slots."""
    launched, captured = (load(small("mixtral"), device, moe_cache_mib=KIB) for _ in range(2))
    capture(captured, device)
    assert tokens(captured, [5]) == tokens(launched, [5])
    sides = [managed_by_gpu(llm) for llm in (launched, captured)]
    for name in ("slot_of", "owner_of", "totals"):
        one, other = (getattr(side._layers.state, name) for side in sides)
        assert torch.equal(one, other), name
    for llm, side in zip((launched, captured), sides, strict=True):
        side.check_integrity()
        report = llm.engine.runner.experts.report()
        assert report is not None
        assert report.residency is not None
        assert report.counts["misses"].sum() > 0
        assert report.residency.ready.sum() == report.counts["misses"].sum() - report.counts["evictions"].sum()
        llm.close()


@pytest.mark.slow
def test_cached_by_the_device_or_by_the_host(device: torch.device, small: Callable[[str], Path]) -> None:
    by_device, by_host = (
        load(small("mixtral"), device, moe_cache_mib=KIB, moe_cache_manager=manager) for manager in ("device", "host")
    )
    assert isinstance(by_host.engine.runner.experts, HostManagedExperts)
    assert tokens(by_device) == tokens(by_host)
    by_device.close()
    by_host.close()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group", "format", "room"), [(4, 32, "int4", "for some"), (8, 0, "int8", "for all")])
def test_quantised_experts_keep_their_codes(
    device: torch.device,
    small: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    group: int,
    format: str,
    room: str,
) -> None:
    """The tokens of the engine that makes them floats when it reads them."""
    write_quantized(str(small("mixtral")), tmp_path / "quantized", bits, group, None, lambda: None)
    settings: dict[str, Any] = {"dtype": "float16", "moe_cache_mib": None if room == "for all" else 32}
    kept = load(tmp_path / "quantized", device, **settings)
    assert format_of(kept) == format
    monkeypatch.setattr("expert_cache.gpu_managed.layout._formats_of", lambda matrix: iter(()))
    floats = load(tmp_path / "quantized", device, **settings | {"moe_cache_mib": None})
    assert format_of(floats) == "plain"
    assert tokens(kept, [5]) == tokens(floats, [5])
    kept.close()
    floats.close()


FAMILIES = [name for name in family_names() if find(name).same_as is None]


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if find(name).recurrence is None])
def test_every_family_without_states_can_be_captured(
    device: torch.device, folders: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing between the embedding and the logits asks the device for a value."""
    monkeypatch.setattr("moe_serve.engine.model_runner.sizes_up_to", lambda limit: [1])
    llm = load(folders(family), device)
    capture(llm, device)
    llm.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if find(name).recurrence is not None])
def test_a_family_with_states_is_not_captured(
    device: torch.device, folders: Callable[[str], Path], family: str
) -> None:
    """A graph would read and write the states of the sequences that ran when it was captured."""
    llm = load(folders(family), device)
    with pytest.raises(RuntimeError, match="recurrent layers keep states"):
        capture(llm, device)
    llm.close()


def test_routes_are_seen_although_steps_are_captured(
    device: torch.device, small: Callable[[str], Path], one_size: None
) -> None:
    """Recording runs steps one operation at a time for as long as it lasts."""
    llm = load(small("mixtral"), device)
    recorded = capture(llm, device)
    llm.engine.runner.observe_routes(True)
    found = tokens(llm, [5])
    llm.engine.runner.observe_routes(False)
    if device.type == "cpu":
        assert recorded.num_replays == 0
    assert tokens(llm, [5]) == found
    llm.close()
