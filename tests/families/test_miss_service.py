"""However a miss is served, the whole engine's tokens and logprobs keep their bits: from slots, streamed, in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from expert_cache.host_managed.acquirer import Acquirer
from expert_cache.storage import expert_file
from moe_serve import LLM
from moe_serve.errors import ConfigError
from moe_serve.hf.checkpoint import checkpoint_fingerprint
from predictors.shape import MoELayer

from .references import Reference
from .serving import SMALL_ENGINE, load, runner_of
from .test_offload import FAMILIES, bits, cache_of

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]


@pytest.mark.parametrize("num_slots", [1, 9])
@pytest.mark.parametrize("case", FAMILIES)
def test_the_page_cache_gives_the_same_bits(
    case: str, num_slots: int, checkpoint: Checkpoint, reference: References
) -> None:
    folder, ref = checkpoint(case), reference(case)
    resident = bits(load(folder, moe_cache_mib=0), ref.prompts)
    llm = load(folder, moe_cache_mib=4, moe_page_cache=True)
    cache = cache_of(llm)
    cache.resize(num_slots)
    for file in folder.glob("*.safetensors"):
        file.read_bytes()
    for _ in range(2):
        llm.engine.pool.clear_cache()
        assert bits(llm, ref.prompts) == resident
    cache.check_integrity()
    assert cache.counters.host_runs.sum() > 0
    llm.close()


@pytest.mark.parametrize("num_transit", [2, 6])
def test_prompts_that_stream_give_the_same_bits(
    num_transit: int, checkpoint: Checkpoint, reference: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that needs every expert reads the next layer ahead and leaves the pools as they are."""
    prompts = [list(range(3, 43)), list(range(43, 3, -1))]
    assert reference("mixtral").outputs
    resident = bits(load(checkpoint("mixtral"), moe_cache_mib=0), prompts)
    llm = load(checkpoint("mixtral"), moe_cache_mib=4)
    cache = cache_of(llm)
    cache.resize(8 + num_transit)
    cache.table.num_transit = num_transit
    cache._reallot(type(cache.table.allowed).shared(8))
    streams: list[bool] = []
    acquire = Acquirer.acquire

    def watching(self: Acquirer, layer: MoELayer, experts: list[int], counts: list[int]) -> object:
        wanted = acquire(self, layer, experts, counts)
        streams.append(wanted.streams)
        return wanted

    monkeypatch.setattr(Acquirer, "acquire", watching)
    for _ in range(2):
        llm.engine.pool.clear_cache()
        assert bits(llm, prompts) == resident
    cache.check_integrity()
    assert any(streams)
    assert not all(streams)
    assert cache.counters.prefetch_hits.sum() > 0
    llm.close()


def test_an_expert_file_in_the_page_cache_is_verified_and_gives_the_same_bits(
    checkpoint: Checkpoint, reference: References, tmp_path: Path
) -> None:
    folder, ref = str(checkpoint("mixtral")), reference("mixtral")
    plain = load(checkpoint("mixtral"), moe_cache_mib=0)
    want = bits(plain, ref.prompts)
    path = tmp_path / "experts"
    expert_file.write(runner_of(plain).loaded.store, path, checkpoint_fingerprint(folder), lambda: None)
    path.read_bytes()
    settings = {**SMALL_ENGINE, "moe_page_cache": True, "moe_cache_mib": 1, "moe_expert_file": str(path)}
    llm = LLM(folder, **settings)
    cache_of(llm).resize(3)
    assert bits(llm, ref.prompts) == want
    assert cache_of(llm).counters.host_runs.sum() > 0
    llm.close()


def test_cpu_misses_without_a_gpu_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="--moe-cpu-misses needs a GPU"):
        load(checkpoint("mixtral"), moe_cpu_misses=True)
