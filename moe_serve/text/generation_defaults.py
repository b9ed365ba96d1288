"""What the checkpoint itself says about sampling: generation_config.json, read as vLLM reads it.

Knows file names and field names; knows no tensors and imports no transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_serve.errors import CheckpointError

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_defaults(folder: str, mode: str = "auto") -> dict[str, Any]:
    """Sampling defaults of a checkpoint, under SamplingParams' names; empty for mode "vllm".

    `do_sample: false` in the file means greedy. Values that are absent or null are left out.
    """
    if mode == "vllm":
        return {}
    config = _read_json(Path(folder) / "generation_config.json")
    defaults = {name: config[name] for name in SAMPLING_FIELDS if config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        defaults["max_tokens"] = config["max_new_tokens"]
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def eos_token_ids(folder: str) -> set[int]:
    """Token ids that end a sequence, from generation_config.json and config.json, that of the text model included."""
    ids: set[int] = set()
    generation, config = (_read_json(Path(folder) / name) for name in ("generation_config.json", "config.json"))
    for fields in (generation, config, config.get("text_config") or {}):
        value = fields.get("eos_token_id")
        if isinstance(value, int):
            ids.add(value)
        elif isinstance(value, list):
            ids.update(int(v) for v in value)
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no UTF-8
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content
