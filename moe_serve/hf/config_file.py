"""config.json becomes a Hugging Face config, of fields that are checked here first.

transformers takes what it finds: a size of 10^9 costs memory before anything fails, and a wrong type fails far from
its field. What it raises itself becomes one line with the file's name. Knows fields; knows no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig

from moe_serve.config.model_folder import read_config_json, read_object, refuse_mlx
from moe_serve.errors import CheckpointError, ConfigError, MoEServeError, one_line
from moe_serve.hf.composites import HOLDS_TEXT, text_config_of
from moe_serve.hf.families import family_in
from moe_serve.hf.family import FAMILY_NAME, find
from moe_serve.hf.quantization_scheme import modelopt_scheme, scheme_of
from moe_serve.hf.scheme import Scheme
from moe_serve.spec import ModelSpec

MODELOPT_NOTE = "hf_quant_config.json"
"""Where older ModelOpt exports say what config.json does not."""
MOST = 1 << 31
"""Of a size: beyond what any model has, and the first that 32 bits do not hold."""
AT_LEAST_ONE = re.compile(
    r"vocab_size|hidden_size|num_hidden_layers|num_attention_heads|num_key_value_heads|head_dim|max_position_embeddings"
    r"|num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts_per_tok|moe_topk|moe_k"
    r"|kv_lora_rank|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|moe_intermediate_size|n_group|topk_group"
    r"|attention_chunk_size"
)
AT_LEAST_NOUGHT = re.compile(
    r"intermediate_size|\w+_intermediate_size|q_lora_rank|n_shared_experts|num_shared_experts|sliding_window"
    r"|first_k_dense_replace|num_nextn_predict_layers|decoder_sparse_step"
)
NUMBER = re.compile(r"\w+_eps|rope_theta|\w+_scaling_factor|initializer_range|\w+_multiplier|logits_scaling")
ROPE = ("rope_scaling", "rope_parameters")
ROPE_NUMBERS = ("factor", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor")


def read_config(folder: str) -> Any:
    """The folder's Hugging Face config, of a family we support; ConfigError says what is wrong."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the path of a Hugging Face checkpoint folder")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder}: config.json is missing; this is not a Hugging Face checkpoint folder")
    fields = read_config_json(folder)
    refuse_mlx(fields, f"{folder}/config.json")
    with naming(f"{folder}/config.json"):
        config = _config_of(folder, fields)
        _refuse_contradictions(ModelSpec.from_hf(config), fields, f"{folder}/config.json")
        scheme_in(folder, config)
    return config


def _config_of(folder: str, fields: dict[str, Any]) -> Any:
    """What AutoConfig makes of the fields: of the text model, under the name by which transformers knows the family."""
    name = family_in(fields) or str(fields.get("model_type"))
    family = find(name)  # before AutoConfig, whose error would list none of ours
    refuse_wrong_fields(fields, f"{folder}/config.json")
    if family.same_as is None or any(name in fields for name in HOLDS_TEXT):
        config = text_config_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        fields = config.to_dict()
    if family.same_as is not None:
        fields = {**fields, **family.sets, "model_type": family.same_as}
        config = CONFIG_MAPPING[family.same_as].from_dict(fields)
        setattr(config, FAMILY_NAME, name)
    _forget_implementations(config)
    return config


def _forget_implementations(config: Any) -> None:
    """A file may name the code that computes attention or experts, which transformers would fetch. Ours does that."""
    config._attn_implementation = config._experts_implementation = None


def scheme_in(folder: str, config: Any) -> Scheme | None:
    """How the folder's matrices are quantised, or None. UnsupportedModelError names what we cannot follow."""
    fields = getattr(config, "quantization_config", None)
    dtype, note = ModelSpec.from_hf(config).dtype, Path(folder) / MODELOPT_NOTE
    if fields is None:
        return modelopt_scheme(read_object(note), dtype, str(note)) if note.is_file() else None
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    return scheme_of(fields, dtype, f"{folder}/config.json")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What a library raises for a wrong field becomes a CheckpointError of one line. A lack of memory stays one."""
    try:
        yield
    except (MoEServeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise errors of every kind for a wrong field
        raise CheckpointError(f"{where}: {one_line(error)}") from error


def refuse_wrong_fields(fields: Mapping[str, Any], where: str) -> None:
    """CheckpointError names a field whose value no model can have. null is transformers' default."""
    for name, value in fields.items():
        problem = None if value is None else _problem(name, value)
        if problem is not None:
            raise CheckpointError(f"{where}: {name} must be {problem}, got {_short(value)}")
    if isinstance(fields.get("text_config"), Mapping):
        refuse_wrong_fields(fields["text_config"], f"{where}: text_config")
    for name in ROPE:
        _refuse_wrong_rope(fields.get(name) or {}, f"{where}: {name}")


def _refuse_contradictions(spec: ModelSpec, fields: Mapping[str, Any], where: str) -> None:
    if spec.top_k > spec.num_experts:
        raise CheckpointError(f"{where}: num_experts_per_tok is {spec.top_k}, but there are {spec.num_experts} experts")
    heads = fields.get("num_attention_heads")
    if fields.get("head_dim") is None and isinstance(heads, int) and heads > spec.hidden_size:
        raise CheckpointError(f"{where}: num_attention_heads is {heads}, more than hidden_size {spec.hidden_size}")


def _problem(name: str, value: Any) -> str | None:
    """What the field must be, if it is not."""
    if AT_LEAST_ONE.fullmatch(name):
        return None if _is_size(value, 1) else f"an integer from 1 to {MOST - 1}"
    if AT_LEAST_NOUGHT.fullmatch(name):
        return None if _is_size(value, 0) else f"an integer from 0 to {MOST - 1}"
    if NUMBER.fullmatch(name):
        return None if _is_number(value) else "a number"
    if name in ROPE:
        return None if isinstance(value, Mapping) else "an object"
    if name in ("dtype", "torch_dtype"):
        return None if _is_float_dtype(value) else "a floating-point type such as 'bfloat16'"
    if name == "quantization_config":
        return None if isinstance(value, Mapping) else "an object"
    return None


def _is_size(value: Any, least: int) -> bool:
    """Also one per layer, as Hunyuan writes them."""
    if isinstance(value, list):
        return bool(value) and all(_is_size(item, least) for item in value)
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_float_dtype(value: Any) -> bool:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _refuse_wrong_rope(rule: Mapping[str, Any], where: str) -> None:
    """A rule, or one for each kind of layer."""
    for name, value in rule.items():
        if isinstance(value, Mapping):
            _refuse_wrong_rope(value, f"{where}.{name}")
        elif name in ("rope_type", "type") and not isinstance(value, str):
            raise CheckpointError(f"{where}.{name} must be a string, got {_short(value)}")
        elif name in ROPE_NUMBERS and value is not None and not (_is_number(value) and 0 < value < 1e30):
            raise CheckpointError(f"{where}.{name} must be a number above 0, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
