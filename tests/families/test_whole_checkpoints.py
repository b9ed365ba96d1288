"""Checkpoints as people have them: every tensor and every setting is used, known to be unneeded, or named in an error.

Twins without a quirk give the right tokens; each test names what was wrong before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expert_cache.storage import expert_file
from moe_serve.cli import main
from moe_serve.doctor.fit import sizes_of
from moe_serve.errors import ConfigError
from moe_serve.hf import family
from moe_serve.hf.checkpoint import open_all_experts

from .quantized_checkpoints import FORMATS, Format, Quantized, fp8, write_pair
from .references import compute_reference
from .relayout import WEIGHTS, Tensors
from .serving import greedy, load, tokens
from .tiny_checkpoints import write_checkpoint
from .tiny_configs import CASES, TinyCase

Fields = dict[str, Any]


def edit(folder: Path, change: Callable[[Fields], object], file: str = "config.json") -> Path:
    fields = json.loads((folder / file).read_text())
    change(fields)
    (folder / file).write_text(json.dumps(fields))
    return folder


def add(folder: Path, more: Callable[[Tensors], Tensors]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | more(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def plain(case: str, folder: Path, **fields: Any) -> Path:
    return edit(write_checkpoint(CASES[case], folder), lambda config: config.update(fields))


def pair(case: str, form: Format, folder: Path) -> tuple[Path, Path]:
    """(quantised, its float twin)."""
    (folder / "pair").mkdir()
    return write_pair(write_checkpoint(CASES[case], folder / "plain"), folder / "pair", form)


def same_tokens(folder: Path, twin: Path, **settings: Any) -> bool:
    ref = compute_reference(twin)
    return bool(tokens(greedy(load(folder, **settings), ref.prompts)) == ref.outputs)


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder)
    return caught.value.message


def static_fp8(w: torch.Tensor) -> Quantized:
    """ModelOpt's FP8: one scale per matrix, one for its input."""
    scale = w.abs().amax() / 448
    codes, matrix = fp8(scale, w)
    return {"weight": codes, "weight_scale": scale.view(()), "input_scale": torch.tensor(0.1)}, matrix


MODELOPT = Format({"quant_method": "fp8"}, static_fp8)
NOTE = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


@pytest.mark.parametrize(
    ("case", "form"), [("qwen3_moe", FORMATS["ct-int8"]), ("mixtral", FORMATS["fp8-blocks"]), ("mixtral", MODELOPT)]
)
def test_codes_without_a_note_are_not_read_as_floats(case: str, form: Format, tmp_path: Path) -> None:
    coded, _ = pair(case, form, tmp_path)
    message = refusal(edit(coded, lambda config: config.pop("quantization_config")))
    assert "neither quantization_config in config.json nor hf_quant_config.json" in message
    assert "weight" in message


def test_packed_codes_without_a_note_are_refused(tmp_path: Path) -> None:
    coded, _ = pair("mixtral", FORMATS["gptq"], tmp_path)
    assert refusal(edit(coded, lambda config: config.pop("quantization_config")))


def test_modelopts_own_note_is_read(tmp_path: Path) -> None:
    coded, twin = pair("mixtral", MODELOPT, tmp_path)
    edit(coded, lambda config: config.pop("quantization_config"))
    (coded / "hf_quant_config.json").write_text(json.dumps(NOTE))
    assert same_tokens(coded, twin)
    (coded / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    assert "hf_quant_config.json: quantization.quant_algo is 'W4A8_AWQ'" in refusal(coded)


FLAT_NOTE = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.29.0"},
}


@pytest.mark.parametrize("note", [FLAT_NOTE, {"quant_method": "modelopt", **NOTE}], ids=["flat", "nested"])
def test_modelopts_note_in_config_json_is_read(note: Fields, tmp_path: Path) -> None:
    coded, twin = pair("mixtral", MODELOPT, tmp_path)
    assert same_tokens(edit(coded, lambda config: config.update(quantization_config=note)), twin)
    edit(coded, lambda config: config["quantization_config"].update(quant_algo="W4A8_AWQ", quantization=None))
    assert "quantization_config.quant_algo is 'W4A8_AWQ'" in refusal(coded)


HADAMARD = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"]}]}}}
SPARSE = {"format": "sparse-24-bitmask"}


@pytest.mark.parametrize(
    ("form", "field", "value"),
    [
        ("ct-int4", "transform_config", HADAMARD),
        ("ct-int4", "sparsity_config", SPARSE),
        ("gptq", "dynamic", {"+:.*self_attn.*": {"bits": 8}}),
        ("gptq", "adapter", {"name": "eora"}),
        ("fp8-blocks", "rotation", "hadamard"),
    ],
)
def test_a_setting_that_changes_the_arithmetic_is_named(form: str, field: str, value: Any, tmp_path: Path) -> None:
    coded, _ = pair("mixtral", FORMATS[form], tmp_path)
    assert field in refusal(edit(coded, lambda config: config["quantization_config"].update({field: value})))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_of_zeros_are_unneeded_and_others_are_named(value: float, tmp_path: Path) -> None:
    coded, twin = pair("mixtral", FORMATS["gptq"], tmp_path)

    def biases(tensors: Tensors) -> Tensors:
        experts = [name for name in tensors if name.endswith("qweight") and "experts" in name]
        return {n.replace("qweight", "bias"): torch.full((tensors[n].shape[1],), value) for n in experts}

    add(coded, biases)
    if value:
        assert "experts.0.w1.bias" in refusal(coded)
    else:
        assert same_tokens(coded, twin)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    folder = add(plain("qwen3_moe", tmp_path), lambda t: {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 2)})
    assert "1 tensors have no place in the model: model.layers.0.self_attn.q_proj.lora_A" in refusal(folder)


def test_more_experts_than_the_config_names_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    folder = add(plain("qwen3_moe", tmp_path), lambda t: {name.format(8): t[name.format(7)].clone()})
    assert "layer 1 has an expert 8, but config.json names 8 experts" in refusal(folder)


def test_e4m3fn_is_e4m3(tmp_path: Path) -> None:
    coded, twin = pair("mixtral", FORMATS["fp8-blocks"], tmp_path)
    edit(coded, lambda config: config["quantization_config"].update(fmt="float8_e4m3fn"))
    assert same_tokens(coded, twin)


@pytest.fixture
def with_mtp(tmp_path: Path) -> Path:
    """GLM-4.5 and DeepSeek-V3: a fourth layer behind the model's three, experts included."""

    def further(tensors: Tensors) -> Tensors:
        last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
        return {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}

    return add(plain("glm4_moe", tmp_path / "tiny", num_nextn_predict_layers=1), further)


def test_layers_of_a_count_of_their_own_are_left_out(tmp_path: Path) -> None:
    """`mtp.layers.0` was taken for layer 0 of the model, experts included."""

    def further(tensors: Tensors) -> Tensors:
        first = {name: torch.full_like(tensor, 3) for name, tensor in tensors.items() if ".layers.1." in name}
        return {name.replace("model.layers.1.", "mtp.layers.1."): tensor for name, tensor in first.items()}

    twin = write_checkpoint(CASES["qwen3_moe"], tmp_path / "twin")
    folder = add(plain("qwen3_moe", tmp_path / "mtp"), further)
    assert same_tokens(folder, twin)
    said, wanted = (sizes_of(str(each), torch.float32) for each in (folder, twin))
    assert said == wanted
    out = tmp_path / "out"
    assert main(["quantize", str(folder), "-o", str(out), "--bits", "8", "--group-size", "32"]) == 0
    assert not [name for name in load_file(out / WEIGHTS) if name.startswith("mtp.") and "packed" in name]


def test_the_doctor_counts_no_layers_behind_the_model(with_mtp: Path, tmp_path: Path) -> None:
    twin = write_checkpoint(CASES["glm4_moe"], tmp_path / "twin")
    assert sizes_of(str(with_mtp), torch.float32) == sizes_of(str(twin), torch.float32)


def test_layers_behind_the_model_are_named_unless_they_predict(with_mtp: Path) -> None:
    """A config.json with a layer too few; without the count, only such a layer's own tensors tell what it is."""
    edit(with_mtp, lambda config: config.update(num_nextn_predict_layers=0))
    assert "tensors have no place in the model: model.layers.3." in refusal(with_mtp)
    add(with_mtp, lambda tensors: {"model.layers.3.eh_proj.weight": torch.ones(2, 2)})
    assert load(with_mtp)


def test_layers_behind_the_model_are_not_packed(with_mtp: Path, tmp_path: Path) -> None:
    packed = tmp_path / "mtp.experts"
    assert main(["pack", str(with_mtp), str(packed)]) == 0
    twin = write_checkpoint(CASES["glm4_moe"], tmp_path / "twin")
    assert expert_file.read(packed)[0].layers == open_all_experts(str(twin)).layers
    assert same_tokens(with_mtp, twin, moe_expert_file=str(packed))


def test_layers_behind_the_model_are_not_quantised(with_mtp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(with_mtp), "-o", str(out), "--bits", "8", "--group-size", "32"]) == 0
    behind = [name for name in load_file(out / WEIGHTS) if ".layers.3." in name]
    assert behind
    assert not [name for name in behind if "packed" in name]
    assert load(out)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_yarn_stretches_the_longest_sequence(tmp_path: Path) -> None:
    folder = plain("qwen3_moe", tmp_path, rope_theta=1e6, max_position_embeddings=64, rope_scaling=YARN)
    edit(folder, lambda config: config.pop("rope_parameters"))
    assert same_tokens(folder, folder, max_model_len=256)
    with pytest.raises(ConfigError, match="exceeds the model's 256 positions"):
        load(folder, max_model_len=257)


def test_kimi_k2_is_deepseek_v3(tmp_path: Path) -> None:
    twin = write_checkpoint(CASES["deepseek_v3"], tmp_path / "twin")
    folder = plain("deepseek_v3", tmp_path / "kimi", model_type="kimi_k2")
    assert same_tokens(folder, twin)


@pytest.mark.parametrize("name", ["model-00001-of-00001", "gptq_model-4bit-128g", "model.fp16"])
def test_files_may_have_any_name(name: str, tmp_path: Path) -> None:
    twin = write_checkpoint(CASES["mixtral"], tmp_path / "twin")
    folder = write_checkpoint(CASES["mixtral"], tmp_path / "odd")
    (folder / WEIGHTS).rename(folder / f"{name}.safetensors")
    assert same_tokens(folder, twin)


LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1 + 0.6 * i for i in range(8)],
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("max_model_len", [32, 256])
def test_longrope_is_chosen_once_for_the_server(max_model_len: int, tmp_path: Path) -> None:
    """Alone or beside others, a prompt has the same tokens: `generate`'s, where that chooses as the server does."""
    folder = plain("phimoe", tmp_path, rope_theta=10000.0, rope_scaling=LONGROPE)
    edit(folder, lambda config: config.pop("rope_parameters"))
    random = torch.Generator().manual_seed(3)
    short, long = (torch.randint(0, 256, (n,), generator=random).tolist() for n in (8, 40))
    llm = load(folder, max_model_len=max_model_len)
    prompt = short if max_model_len == 32 else long
    (alone,) = tokens(greedy(llm, [prompt]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=len(alone), do_sample=False)  # type: ignore[misc]
    assert wanted[0, len(prompt) :].tolist() == list(alone)
    if max_model_len == 256:
        assert tokens(greedy(llm, [short, long])) == (*tokens(greedy(llm, [short])), alone)


LINEAR_ATTENTION = TinyCase(
    "qwen3_next",
    {
        **{"num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 64},
        **{"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
        "linear_value_head_dim": 16,
    },
)


def test_layers_whose_state_is_not_carried_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four layers keep a running state instead of keys; a family of one line once answered wrong."""
    found = family.Family("Qwen3NextExperts")
    monkeypatch.setattr(family, "find", lambda name: found)
    assert "3 of the 4 layers of this qwen3_next model (linear_attention) cache no keys" in refusal(
        write_checkpoint(LINEAR_ATTENTION, tmp_path)
    )
