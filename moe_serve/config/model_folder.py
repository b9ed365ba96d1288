"""MODEL as the user wrote it becomes a checkpoint folder: a path, a model id, or a folder of the Hugging Face cache.

Looks at names and at config.json only; reads no weights, imports no torch, asks no network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_serve.errors import CheckpointError, ConfigError, one_line

MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""org/name, as on the Hugging Face hub."""
CACHE_PREFIX = "models--"
CONFIG = "config.json"
FOREIGN_WEIGHTS = {
    "*.gguf": "holds GGUF files, which moe-serve does not read; get the model's safetensors checkpoint",
    "consolidated*": "is in Mistral's own format; get the Hugging Face version of the checkpoint",
    "pytorch_model*.bin": "has weights as pytorch_model.bin only; convert it with save_pretrained",
}
"""What people have instead of a checkpoint that we read."""


def find_model(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """The checkpoint folder for MODEL, with a config.json in it. ConfigError and CheckpointError say what to do."""
    path = Path(name)
    if path.is_file():
        kind = "a GGUF file, which moe-serve does not read" if path.suffix == ".gguf" else "a file"
        raise ConfigError(f"{name} is {kind}; give the folder of a Hugging Face checkpoint")
    if not path.is_dir():
        return str(_in_cache(name, environment))
    if (path / CONFIG).is_file():
        return name
    snapshot = _snapshot_of(path.parent if path.name == "snapshots" else path)
    if snapshot is not None:
        return str(snapshot)
    for pattern, reason in FOREIGN_WEIGHTS.items():
        if any(path.glob(pattern)):
            raise CheckpointError(f"{name} {reason}")
    raise CheckpointError(f"{name}: {CONFIG} is missing; this is not a Hugging Face checkpoint folder")


def _in_cache(name: str, environment: Mapping[str, str]) -> Path:
    """A model id's folder in the local cache."""
    if not MODEL_ID.fullmatch(name):
        raise ConfigError(f"{name}: no such folder; give the path of a Hugging Face checkpoint folder")
    cache = cache_folder(environment)
    snapshot = _snapshot_of(cache / (CACHE_PREFIX + name.replace("/", "--")))
    if snapshot is None:
        raise ConfigError(
            f"{name}: no such folder, and no such model in the Hugging Face cache {cache};"
            f" download it with `hf download {name}`"
        )
    return snapshot


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where Hugging Face's libraries keep downloads."""
    if "HF_HUB_CACHE" in environment:
        return Path(environment["HF_HUB_CACHE"])
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environment.get("HF_HOME") or Path(base) / "huggingface") / "hub"


def _snapshot_of(folder: Path) -> Path | None:
    """The snapshot that `main` names, else the newest one with a config.json, of a model's folder in the cache."""
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text().strip()
        if (named / CONFIG).is_file():
            return named
    found = [path for path in (folder / "snapshots").glob("*") if (path / CONFIG).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


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
