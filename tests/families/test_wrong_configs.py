"""A config.json that no model can have: one line that names file and field, before memory or time is spent."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.hf.checkpoint import open_all_experts
from moe_serve.hf.config_file import read_config
from moe_serve.text.generation_defaults import eos_token_ids

from .serving import load
from .tiny_checkpoints import write_checkpoint
from .tiny_configs import CASES

Checkpoint = Callable[[str], Path]


def with_fields(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return write_checkpoint(CASES["mixtral"], tmp_path / "tiny")


YARN_WITHOUT_FACTOR = {"rope_type": "yarn", "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -1),
        ("hidden_size", "64"),
        ("vocab_size", 10**12),
        ("num_attention_heads", 1.5),
        ("num_attention_heads", 0),
        ("num_local_experts", True),
        ("num_hidden_layers", [3, "3"]),
        ("sliding_window", -1),
        ("attention_chunk_size", []),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("dtype", "x"),
        ("dtype", []),
        ("torch_dtype", "int8"),
        ("rope_scaling", 3),
        ("quantization_config", "gptq"),
        ("eos_token_id", "x"),
        ("attention_dropout", "x"),
        ("tie_word_embeddings", 3),
    ],
)
def test_a_field_of_a_wrong_value_is_named(field: str, value: Any, mixtral: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(str(with_fields(mixtral, **{field: value})))
    assert caught.value.message.startswith(f"{mixtral}/config.json: ")
    assert field in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["factor", "rope_theta", "original_max_position_embeddings", "rope_type"])
def test_a_position_rule_names_its_field(name: str, mixtral: Path) -> None:
    rule = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    with pytest.raises(CheckpointError, match=rf"rope_scaling\.{name} must be"):
        read_config(str(with_fields(mixtral, rope_scaling=rule | {name: [1]})))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 in config.json, but .* have 3 layers"),
        ({"num_hidden_layers": 2}, r"tensors have no place in the model: model\.layers\.2\."),
        (
            {"vocab_size": 10**9},
            r"config.json asks for .*embed_tokens.weight of shape \(1000000000, 64\), more than all",
        ),
        (
            {"num_local_experts": 10**9},
            r"config.json asks for .*gate.weight of shape \(1000000000, 64\), more than all",
        ),
        ({"num_attention_heads": 10**6}, "num_attention_heads is 1000000, more than hidden_size 64"),
        (
            {"num_attention_heads": 10**6, "head_dim": 16},
            "config.json asks for .*q_proj.weight of shape .* more than all",
        ),
        ({"hidden_size": 128}, r"has shape .*64.*, but config.json asks for .*128"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"hidden_act": "magic"}, "magic"),
    ],
)
def test_sizes_are_compared_with_the_files(fields: dict[str, Any], words: str, mixtral: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load(with_fields(mixtral, **fields))
    assert str(mixtral) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "mtp_num_layers"])
def test_a_count_of_further_layers_costs_nothing(field: str, mixtral: Path) -> None:
    """A set of 10^9 numbers was made of it, found by tests/fuzz/fuzz_checkpoints.py."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30), limit[1]))
    try:
        load(with_fields(mixtral, **{field: 10**9}))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_too_many_layers_are_refused_without_loading(mixtral: Path) -> None:
    """doctor, pack and quantize look at the files only."""
    with pytest.raises(CheckpointError, match="have 3 layers"):
        open_all_experts(str(with_fields(mixtral, num_hidden_layers=10**9)))


@pytest.mark.parametrize("value", ["x", 1.5, True, [1, "2"], {"a": 1}])
def test_what_is_no_token_id_ends_no_sequence(value: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be a token id"):
        eos_token_ids(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_file_that_is_no_object_is_named(file: str, text: str, mixtral: Path) -> None:
    (mixtral / file).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        load(mixtral)
    assert f"{mixtral}/{file}" in caught.value.message
    assert "\n" not in caught.value.message
