"""Quantised checkpoints through the whole engine: what they compute is what their float twins compute.

Resident, from a cache smaller than the model, and from an expert file; every format, and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cache.storage import expert_file
from expert_cache.storage.store import ExpertStore
from moe_serve import LLM, SamplingParams
from moe_serve.cli import main
from moe_serve.errors import CheckpointError, UnsupportedModelError
from moe_serve.hf.checkpoint import checkpoint_fingerprint, open_all_experts
from moe_serve_kernels.cpu.expert_mlp import MLPWeights, as_tensor
from moe_serve_kernels.quantized import QuantizedRows
from predictors.shape import MoELayer

from .quantized_checkpoints import FORMATS, write_mxfp4_pair, write_pair
from .references import make_prompts
from .relayout import copy_with
from .serving import experts_of, load

Pair = tuple[Path, Path]
NAMES = [*FORMATS, "mxfp4"]
COPIED = {"gptq", "gptq-zeros", "gptq-v2-zeros", "gptq-8", "gptq-ordered", "ct-int4-ordered", "awq"}
COPIED |= {"auto-round-gptq", "auto-round", "auto-round-awq"}
ALIKE = {"ct-mxfp4", "modelopt-fp8", "ct-nvfp4", "auto-round-gptq", "auto-round", "auto-round-awq"}
"""Whose engine runs are those of another format here; their values are compared in every run."""
ORDERED = {"gptq-ordered", "ct-int4-ordered"}
SAMPLING = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def pair(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Format's name -> (quantised checkpoint, float twin)."""

    def write(name: str) -> Pair:
        folder = tmp_path_factory.mktemp(name)
        if name == "mxfp4":
            return write_mxfp4_pair(checkpoint("gpt_oss"), folder)
        return write_pair(checkpoint("mixtral"), folder, FORMATS[name])

    return cache(write)


def answers(folder: Path, **settings: Any) -> list[tuple[Any, Any]]:
    llm = load(folder, **settings)
    results = llm.generate(make_prompts()[:3], SAMPLING)
    experts_of(llm).check_integrity()
    return [(r.completions[0].token_ids, r.completions[0].logprobs) for r in results]


def floats(store: ExpertStore, layer: MoELayer, expert: int) -> list[torch.Tensor]:
    weights = store.weights(layer, expert)
    return [as_tensor(m, torch.float32) for m in (weights.gate, weights.up, weights.down)]


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_what_the_codes_stand_for(pair: Callable[[str], Pair], name: str) -> None:
    quantized, twin = (open_all_experts(str(folder)) for folder in pair(name))
    for layer in twin.layers:
        for expert in range(twin.num_experts):
            for got, wanted in zip(floats(quantized, layer, expert), floats(twin, layer, expert), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in NAMES])
def test_tokens_are_those_of_the_float_twin(pair: Callable[[str], Pair], name: str) -> None:
    for got, wanted in zip(*(answers(folder) for folder in pair(name)), strict=True):
        assert got[0] == wanted[0]
        for ours, theirs in zip(got[1], wanted[1], strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("name", ["ct-int4", "ct-int4-zeros", "fp8-blocks", "gptq-ordered", "awq", "mxfp4"])
def test_a_cache_and_an_expert_file_give_the_bits_of_the_resident_one(
    pair: Callable[[str], Pair], name: str, tmp_path: Path
) -> None:
    folder = pair(name)[0]
    resident = answers(folder)
    assert answers(folder, moe_cache_mib=1, moe_cache_pool="global") == resident
    packed = tmp_path / "experts.bin"
    assert main(["pack", str(folder), str(packed)]) == 0
    assert answers(folder, moe_expert_file=str(packed)) == resident
    assert answers(folder, moe_expert_file=str(packed), moe_cache_mib=1, moe_cache_pool="global") == resident


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_takes_as_few_bytes_as_its_codes(pair: Callable[[str], Pair], name: str, tmp_path: Path) -> None:
    stores = [open_all_experts(str(folder)) for folder in pair(name)]
    bits = 8 if "8" in name else 4
    with_scales = 1.3 * stores[1].expert_bytes * bits / 32
    assert stores[0].expert_bytes < with_scales
    expert_file.write(stores[0], tmp_path / "packed", checkpoint_fingerprint(str(pair(name)[0])), lambda: None)
    packed, _ = expert_file.read(tmp_path / "packed")
    assert (packed.expert_bytes < with_scales) is (name not in ORDERED)
    assert not packed.is_copied


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ORDERED])
def test_the_kernel_runs_on_the_codes(pair: Callable[[str], Pair], name: str) -> None:
    experts = experts_of(load(pair(name)[0]))
    weights = experts.compute.prepare(experts.store.weights(experts.store.layers[0], 0))
    assert isinstance(weights, MLPWeights)
    assert isinstance(weights.gate, QuantizedRows)
    assert experts.store.is_copied is (name in COPIED)


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy whose quantization_config differs in `fields`."""
    copy_with(folder, target, lambda tensors: tensors)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def groups_of(*targets: object) -> dict[str, Any]:
    """compressed-tensors' groups a, b, ..., of one target each."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    return {name: {"targets": [target], "weights": weights} for name, target in zip("ab", targets, strict=True)}


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "quantization_config.quant_method"),
        ("gptq", {"bits": 3}, "quantization_config.bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format"),
        ("awq", {"version": "gemv"}, "quantization_config.version"),
        ("auto-round", {"packing_format": "auto_round:mlx"}, "quantization_config.packing_format"),
        ("auto-round", {"extra_config": {"model.layers.1": {"bits": 8}}}, "extra_config.model.layers.1.bits"),
        ("ct-int4", {"format": "marlin-24"}, "quantization_config.format"),
        ("ct-int4", {"config_groups": {}}, "quantization_config.config_groups"),
        ("ct-int4", {"config_groups": groups_of("Linear", "re:(")}, "config_groups.b.targets"),
        ("ct-int4", {"config_groups": groups_of("Linear", 5)}, "config_groups.b.targets"),
        ("fp8-blocks", {"fmt": "e5m2"}, "quantization_config.fmt"),
    ],
)
def test_what_cannot_be_read_is_refused_naming_the_field(
    pair: Callable[[str], Pair], tmp_path: Path, name: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        LLM(str(changed(pair(name)[0], tmp_path / "changed", **fields)))


def test_a_wrong_group_size_names_the_tensor(pair: Callable[[str], Pair], tmp_path: Path) -> None:
    folder = changed(pair("gptq")[0], tmp_path / "changed", group_size=16)
    with pytest.raises(CheckpointError, match=r"scales has shape \(2, 64\), but config.json asks for \(4, 64\)"):
        open_all_experts(str(folder))


@pytest.mark.parametrize(("ending", "missing"), [("w1.weight_scale", "no scales"), ("w2.weight_packed", "no down")])
def test_a_missing_tensor_is_named(pair: Callable[[str], Pair], tmp_path: Path, ending: str, missing: str) -> None:
    folder = copy_with(
        pair("ct-int4")[0], tmp_path / "broken", lambda ts: {n: t for n, t in ts.items() if not n.endswith(ending)}
    )
    with pytest.raises(CheckpointError, match=missing):
        open_all_experts(str(folder))
