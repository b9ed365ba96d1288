"""A damaged checkpoint folder: the error names the file, and the tensor where there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_serve import LLM
from moe_serve.errors import CheckpointError, ConfigError, MoEServeError

from .relayout import WEIGHTS, Tensors, copy_with, fuse_experts, reshard, shard_name
from .serving import load

Checkpoint = Callable[[str], Path]
FAMILY = "qwen3_moe"
SHARDS = 3


def refusal(folder: Path, kind: type[MoEServeError] = CheckpointError) -> str:
    """The message with which loading `folder` fails."""
    with pytest.raises(kind) as caught:
        load(folder)
    return caught.value.message


@pytest.fixture
def sharded(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return reshard(checkpoint(FAMILY), tmp_path, SHARDS)


def without(name: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        del tensors[name]
        return tensors

    return change


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no-such-folder" in refusal(tmp_path / "no-such-folder", ConfigError)


def test_no_config(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(FAMILY), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").unlink()
    assert "config.json" in refusal(tmp_path)


def test_a_config_that_is_not_json(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(FAMILY), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path)


def test_no_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(FAMILY), tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS).unlink()
    assert "safetensors" in refusal(tmp_path)


def test_a_missing_shard(sharded: Path) -> None:
    lost = shard_name(1, SHARDS)
    (sharded / lost).unlink()
    assert lost in refusal(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    cut = sharded / shard_name(2, SHARDS)
    cut.write_bytes(cut.read_bytes()[:-100])
    assert cut.name in refusal(sharded)


def test_an_empty_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(FAMILY), tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert WEIGHTS in refusal(tmp_path)


def test_an_index_that_lies(sharded: Path) -> None:
    """A tensor is placed in a shard that does not hold it, or held by a shard without being named."""
    index = sharded / f"{WEIGHTS}.index.json"
    told = json.loads(index.read_text())
    name = next(name for name, file in told["weight_map"].items() if file == shard_name(1, SHARDS))
    told["weight_map"][name] = shard_name(2, SHARDS)
    index.write_text(json.dumps(told))
    assert f"{shard_name(1, SHARDS)}: this shard holds {name}, but" in refusal(sharded)
    told["weight_map"][name] = shard_name(1, SHARDS)
    told["weight_map"]["model.layers.7.made.up"] = shard_name(0, SHARDS)
    index.write_text(json.dumps(told))
    said = refusal(sharded)
    assert shard_name(0, SHARDS) in said
    assert "model.layers.7.made.up" in said


def test_an_index_that_is_not_json(sharded: Path) -> None:
    index = sharded / f"{WEIGHTS}.index.json"
    index.write_text("not json")
    assert index.name in refusal(sharded)


def test_an_index_without_a_map(sharded: Path) -> None:
    index = sharded / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    assert index.name in refusal(sharded)


def test_a_missing_dense_tensor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    message = refusal(copy_with(checkpoint(FAMILY), tmp_path, without(name)))
    assert name in message
    assert str(tmp_path) in message


def test_a_missing_expert_tensor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    message = refusal(copy_with(checkpoint(FAMILY), tmp_path, without(name)))
    assert "layer 2 expert 5" in message
    assert "up" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_without_any_experts(layer: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {n: t for n, t in tensors.items() if f"layers.{layer}.mlp.experts." not in n}

    assert f"layer {layer}" in refusal(copy_with(checkpoint(FAMILY), tmp_path, change))


def test_a_missing_fused_tensor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return without("model.layers.1.mlp.experts.down_proj")(fuse_experts(tensors))

    message = refusal(copy_with(checkpoint(FAMILY), tmp_path, change))
    assert "layer 1" in message
    assert "down" in message


def test_an_expert_of_the_wrong_shape(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.weight"

    def change(tensors: Tensors) -> Tensors:
        return tensors | {name: torch.zeros(64, 63)}

    message = refusal(copy_with(checkpoint(FAMILY), tmp_path, change))
    assert "layer 0 expert 3" in message


def test_fewer_experts_than_the_config_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The router could choose an expert that is not there: to be found now, not in a request."""

    def change(tensors: Tensors) -> Tensors:
        return {n: t for n, t in tensors.items() if ".experts.7." not in n}

    assert "expert 7" in refusal(copy_with(checkpoint(FAMILY), tmp_path, change))


def test_a_dense_tensor_of_the_wrong_shape(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def change(tensors: Tensors) -> Tensors:
        return tensors | {name: torch.zeros(32, 32)}

    message = refusal(copy_with(checkpoint(FAMILY), tmp_path, change))
    assert name in message


def test_no_tokenizer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(FAMILY), tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    assert str(tmp_path) in refusal(tmp_path, ConfigError)


def test_a_good_copy_loads(sharded: Path) -> None:
    """The control: what the tests above damage is whole to begin with."""
    assert load(sharded).engine.spec.model_type == FAMILY


def test_settings_that_do_not_exist_are_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        LLM(str(checkpoint(FAMILY)), max_nun_seqs=4)


def test_code_of_a_checkpoint_is_not_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(checkpoint(FAMILY), folder)
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    for file in ("config.json", "tokenizer_config.json"):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": names}))
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    load(folder).close()
    assert not ran.exists()


@pytest.mark.parametrize(
    "field",
    ["_attn_implementation_internal", "_attn_implementation", "attn_implementation", "_experts_implementation"],
)
def test_a_config_names_no_code_to_fetch(
    field: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers once fetched a hub's kernel that a config named, and ran it."""
    fetched: list[object] = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *args, **_: fetched.append(args))
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(FAMILY), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "somebody/kernel"}))
    load(folder).close()
    assert not fetched
