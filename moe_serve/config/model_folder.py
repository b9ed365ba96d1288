"""Checkpoint folders and the Hugging Face cache that holds them: which folder a model id is, and what its config says.

Looks at names and at config.json only; reads no weights, imports no torch, asks no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_serve.errors import CheckpointError, one_line

CACHE_PREFIX = "models--"
CONFIG = "config.json"
FOREIGN_WEIGHTS = {
    "consolidated*": "is in Mistral's own format; get the Hugging Face version of the checkpoint",
    "pytorch_model*.bin": "has weights as pytorch_model.bin only; convert it with save_pretrained",
    "adapter_model*": "has the weights of an adapter only; merge it into the model that it was made for",
}
"""What people have instead of a checkpoint that we read."""


def refuse_foreign_weights(folder: Path) -> None:
    """CheckpointError names the format of a folder without weights that we read, where it is a known one."""
    for pattern, reason in FOREIGN_WEIGHTS.items():
        if any(folder.glob(pattern)):
            raise CheckpointError(f"{folder} {reason}")


def refuse_mlx(fields: Mapping[str, Any], where: str) -> None:
    """CheckpointError where config.json's fields have MLX's note of bits and a group size."""
    note = fields.get("quantization")
    if isinstance(note, Mapping) and {"bits", "group_size"} <= note.keys():
        raise CheckpointError(
            f"{where}: quantization is MLX's note (mlx-community), whose checkpoints are not read; take the checkpoint"
            " that this one was made from, or a GGUF file of it"
        )


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where Hugging Face's libraries keep downloads."""
    if "HF_HUB_CACHE" in environment:
        return Path(environment["HF_HUB_CACHE"])
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environment.get("HF_HOME") or Path(base) / "huggingface") / "hub"


def model_id_of(folder: str) -> str | None:
    """org/name of a snapshot in the Hugging Face cache; None for another folder."""
    parents = Path(folder).absolute().parents
    if len(parents) < 2 or parents[0].name != "snapshots" or not parents[1].name.startswith(CACHE_PREFIX):
        return None
    return parents[1].name.removeprefix(CACHE_PREFIX).replace("--", "/", 1)


def read_config_json(folder: str) -> dict[str, Any]:
    """The fields of config.json. CheckpointError if it is no JSON object."""
    return read_object(Path(folder) / CONFIG)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in one of a checkpoint's files. CheckpointError."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return fields
