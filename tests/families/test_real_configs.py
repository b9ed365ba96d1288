"""Twins of published checkpoints: their config.json with every key, sizes scaled down, and their tensors' names.

Each gives the tokens of the plain checkpoint, or of the float twin where the published one is quantised.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .quantized_checkpoints import FORMATS, Format, modelopt_fp8, write_pair
from .references import compute_reference
from .relayout import WEIGHTS, Tensors
from .serving import greedy, load, tokens
from .tiny_checkpoints import write_checkpoint
from .tiny_configs import CASES

OUR_KEYS = ("dtype", "rope_parameters", "transformers_version", "architectures")
"""What transformers 5 writes, and older configs do not have."""
NO_TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001, "initializer_range": 0.02}
REMOTE_CODE = {"auto_map": {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}}


@dataclass(frozen=True)
class Published:
    """A checkpoint as it was published."""

    case: str
    fields: dict[str, Any]
    """Of config.json, beside those of the tiny case."""
    quantized: Format | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    """Of quantization_config, beside those of the format."""
    behind: tuple[str, ...] = ()
    """Further tensors of a layer behind the last one, which is a copy of the last one otherwise."""


MTP = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight", "shared_head.head.weight")
PUBLISHED: dict[str, Published] = {
    "Mixtral-8x7B-Instruct-v0.1": Published(
        "mixtral",
        {
            **NO_TRAINING,
            **{"architectures": ["MixtralForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "4.36.0"},
            **{"rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0, "use_cache": True},
        },
    ),
    "DeepSeek-V2-Lite": Published(
        "deepseek_v2_lite",
        {
            **{**REMOTE_CODE, "architectures": ["DeepseekV2ForCausalLM"], "torch_dtype": "bfloat16"},
            **{"topk_method": "greedy", "scoring_func": "softmax", "seq_aux": True, "aux_loss_alpha": 0.001},
            **{"ep_size": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "pretraining_tp": 1, "rope_theta": 10000},
            **{"n_group": 1, "topk_group": 1, "transformers_version": "4.33.1"},
            "rope_scaling": {
                **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
                **{"original_max_position_embeddings": 16, "type": "yarn"},
            },
        },
    ),
    "DeepSeek-V3": Published(
        "deepseek_v3",
        {
            **{**REMOTE_CODE, "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16"},
            **{"topk_method": "noaux_tc", "scoring_func": "sigmoid", "seq_aux": True, "aux_loss_alpha": 0.001},
            **{"ep_size": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "rope_theta": 10000},
            "rope_scaling": {
                **{"beta_fast": 32, "beta_slow": 1, "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0},
                **{"original_max_position_embeddings": 64, "type": "yarn"},
            },
        },
        FORMATS["fp8-blocks"],
        behind=(*MTP, "embed_tokens.weight"),
    ),
    "Kimi-K2-Thinking": Published(
        "deepseek_v3",
        {
            **{**REMOTE_CODE, "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
            **{"torch_dtype": "bfloat16", "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_theta": 50000.0},
            **{"aux_loss_alpha": 0.001, "seq_aux": True, "num_nextn_predict_layers": 0, "moe_layer_freq": 1},
        },
        FORMATS["ct-int4"],
        {
            **{"kv_cache_scheme": None, "quantization_status": "compressed", "global_compression_ratio": None},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*"],
        },
    ),
    "GLM-4.5-Air-FP8": Published(
        "glm4_moe",
        {
            **{"architectures": ["Glm4MoeForCausalLM"], "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1},
            **{"partial_rotary_factor": 0.5, "rope_scaling": None, "rope_theta": 1000000, "use_qk_norm": True},
        },
        FORMATS["ct-fp8"],
        {"kv_cache_scheme": None, "ignore": ["lm_head", "model.layers.1.mlp.gate"]},
        behind=MTP,
    ),
    "MiniMax-M2": Published(
        "minimax_m2",
        {
            **{**REMOTE_CODE, "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1, 1, 1]},
            **{"num_mtp_modules": 3, "mtp_transformer_layers": 1, "use_mtp": True, "use_qk_norm": True},
            **{"qk_norm_type": "per_layer", "rotary_dim": 8, "scoring_func": "sigmoid", "rope_theta": 5000000},
            **{"use_routing_bias": True, "shared_intermediate_size": 0, "router_jitter_noise": 0.0},
        },
        FORMATS["fp8-blocks"],
        {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
    ),
    "Qwen3-30B-A3B-NVFP4": Published(
        "qwen3_moe",
        {
            **NO_TRAINING,
            **{"architectures": ["Qwen3MoeForCausalLM"], "torch_dtype": "bfloat16", "max_window_layers": 48},
            **{"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_scaling": None},
            **{"rope_theta": 1000000.0, "sliding_window": None},
        },
        FORMATS["modelopt-nvfp4"],
        {
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
            **{"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "producer": {"name": "modelopt"}},
            "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        },
    ),
}
FAST = {"DeepSeek-V3", "Qwen3-30B-A3B-NVFP4"}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


def publish(published: Published, folder: Path) -> tuple[Path, Path]:
    """(the checkpoint as published, its float twin)."""
    source = write_checkpoint(CASES[published.case], folder / "source")
    _edit(source, published.fields)
    form = published.quantized
    if form is None:
        return source, source
    (folder / "pair").mkdir()
    only_experts = "re:.*self_attn.*" in published.quantization.get("ignore", ())
    coded, twin = write_pair(
        source, folder / "pair", form, lambda name: None if only_experts and "self_attn" in name else form
    )
    config = json.loads((coded / "config.json").read_text())["quantization_config"]
    _edit(coded, {"quantization_config": {**config, **published.quantization}}, replaces=False)
    if published.behind:
        _add_layer(coded, published.behind)
    return coded, twin


def _edit(folder: Path, fields: dict[str, Any], replaces: bool = True) -> None:
    """`replaces`: keys that the published config does not have go."""
    config = json.loads((folder / "config.json").read_text())
    if replaces:
        config = {key: value for key, value in config.items() if key not in OUR_KEYS or key in fields}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def _add_layer(folder: Path, names: tuple[str, ...]) -> None:
    """A layer for predicting several tokens at once, numbered behind the model's last one, 2."""
    tensors: Tensors = load_file(folder / WEIGHTS)
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    tensors |= {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}
    tensors |= {f"model.layers.3.{name}": torch.ones(64, 64) for name in names}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("name", NAMES)
def test_a_published_checkpoint_gives_the_tokens_of_its_twin(name: str, tmp_path: Path) -> None:
    coded, twin = publish(PUBLISHED[name], tmp_path)
    config = json.loads((twin / "config.json").read_text())
    if config["model_type"] == "kimi_k2":  # transformers knows it as DeepSeek-V3 only
        _edit(twin, {"model_type": "deepseek_v3"}, replaces=False)
    reference = compute_reference(twin)
    assert tokens(greedy(load(coded), reference.prompts)) == reference.outputs


def test_nvfp4_experts_beside_fp8_attention(tmp_path: Path) -> None:
    """As NVIDIA exports Qwen3.6: one checkpoint, two formats, told apart by the codes' type."""
    (tmp_path / "pair").mkdir()
    source = write_checkpoint(CASES["qwen3_moe"], tmp_path / "source")

    def form_of(name: str) -> Format:
        return modelopt_fp8() if "self_attn" in name else FORMATS["modelopt-nvfp4"]

    coded, twin = write_pair(source, tmp_path / "pair", FORMATS["modelopt-nvfp4"], form_of)
    layers = {"model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}, "lm_head": {"quant_algo": "NVFP4"}}
    note: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    _edit(coded, {"quantization_config": note}, replaces=False)
    reference = compute_reference(twin)
    assert tokens(greedy(load(coded), reference.prompts)) == reference.outputs
    # The same in the file that older exports have instead.
    older = Path(shutil.copytree(coded, tmp_path / "older"))
    config = json.loads((older / "config.json").read_text())
    del config["quantization_config"], note["quant_method"]
    (older / "config.json").write_text(json.dumps(config))
    (older / "hf_quant_config.json").write_text(json.dumps({"quantization": note}))
    assert tokens(greedy(load(older), reference.prompts)) == reference.outputs
