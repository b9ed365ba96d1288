"""What the checkpoint itself says about sampling: generation_config.json, read as vLLM reads it.

Knows file names and field names; knows no tensors and imports no transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_serve.config.model_folder import read_object
from moe_serve.errors import CheckpointError, InvalidRequestError
from moe_serve.scheduling.sequence import SamplingParams

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_generation_defaults(folder: str, mode: str = "auto") -> dict[str, Any]:
    """Sampling defaults of a checkpoint, under SamplingParams' names; empty for mode "vllm".

    `do_sample: false` in the file means greedy. Values that are absent or null are left out. CheckpointError names a
    value with which no request could be served.
    """
    if mode == "vllm":
        return {}
    path = Path(folder) / "generation_config.json"
    config = _read_json(path)
    defaults = {name: config[name] for name in SAMPLING_FIELDS if config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        defaults["max_tokens"] = config["max_new_tokens"]
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise CheckpointError(f"{path}: {error.message}; --generation-config vllm leaves the file out") from error
    return defaults


def eos_token_ids(folder: str) -> set[int]:
    """Token ids that end a sequence, from generation_config.json and config.json, that of the text model included.

    CheckpointError.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        fields = _read_json(Path(folder) / name)
        text = fields.get("text_config")
        for part in (fields, text if isinstance(text, dict) else {}):
            ids.update(_eos_in(part, f"{folder}/{name}"))
    return ids


def _eos_in(fields: dict[str, Any], where: str) -> list[int]:
    value = fields.get("eos_token_id")
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in found):
        raise CheckpointError(f"{where}: eos_token_id must be a token id or a list of them, got {value!r}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one when there is no such file."""
    return read_object(path) if path.is_file() else {}
