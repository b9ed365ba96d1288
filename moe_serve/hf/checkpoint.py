"""Reading a Hugging Face checkpoint folder: its config, and its expert tensors as mmapped views.

Errors name the file and the tensor. Knows no model code.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from expert_cache.store import ExpertStore, FusedLayout
from moe_serve.errors import CheckpointError, ConfigError, UnsupportedModelError
from moe_serve.hf.family import PART_OF, Family

INDEX = "model.safetensors.index.json"
Parts = dict[tuple[str, int | None], torch.Tensor]


def read_config(folder: str) -> Any:
    """The folder's Hugging Face config; ConfigError if it is not a checkpoint folder."""
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the path of a Hugging Face checkpoint folder")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder}: config.json is missing; this is not a Hugging Face checkpoint folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(f"{folder}: quantised checkpoints ({method}) are not supported yet; use a bf16 one")
    return config


def safetensors_files(folder: str) -> list[Path]:
    """The checkpoint's files, all present; CheckpointError names a missing shard."""
    path = Path(folder)
    if (path / INDEX).is_file():
        names = sorted(set(_read_index(path / INDEX).values()))
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{folder}: no *.safetensors file; convert the checkpoint with save_pretrained")
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"{folder}/{name}: this shard is listed in {INDEX} but missing")
    return [path / name for name in names]


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(k): str(v) for k, v in weight_map.items()}
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a valid index ({error})") from error


def open_experts(folder: str, family: Family, layers: list[int]) -> ExpertStore:
    """Map every expert tensor of the checkpoint; nothing is read yet.

    `layers`: the decoder layers that must have experts. CheckpointError names what is missing.
    """
    tensors: dict[int, Parts] = defaultdict(dict)
    for file in safetensors_files(folder):
        for layer, part, expert, tensor in _expert_tensors(file, family):
            tensors[layer][part, expert] = tensor
    num_experts = _check_complete(folder, {layer: tensors[layer] for layer in layers})
    fused = FusedLayout(transposed=family.transposed, interleaved=family.interleaved)
    return ExpertStore({layer: tensors[layer] for layer in layers}, num_experts, fused)


def _expert_tensors(file: Path, family: Family) -> Iterator[tuple[int, str, int | None, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
                match = family.match(name)
                if match:
                    groups = match.groupdict()
                    expert = int(groups["expert"]) if groups.get("expert") else None
                    yield int(groups["layer"]), PART_OF[groups["part"]], expert, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error})") from error


def _check_complete(folder: str, tensors: dict[int, Parts]) -> int:
    """Number of experts per layer; every layer must have every part of every expert."""
    num_experts = max((_num_experts(parts) for parts in tensors.values()), default=0)
    if num_experts == 0:
        raise CheckpointError(f"{folder}: no expert tensors with names this model family uses")
    for layer, parts in tensors.items():
        for expert in range(num_experts):
            _check_expert(folder, layer, expert, parts)
    return num_experts


def _num_experts(parts: Parts) -> int:
    return max((t.shape[0] if e is None else e + 1 for (_, e), t in parts.items()), default=0)


def _check_expert(folder: str, layer: int, expert: int, parts: Parts) -> None:
    def has(part: str) -> bool:
        return (part, expert) in parts or ((part, None) in parts and expert < parts[part, None].shape[0])

    wanted = ("gate", "up", "down") if any(p == "gate" for p, _ in parts) else ("gate_up", "down")
    missing = [part for part in wanted if not has(part)]
    if missing:
        raise CheckpointError(
            f"{folder}: layer {layer} expert {expert}: the {' and '.join(missing)} projection is missing from the"
            " checkpoint's *.safetensors files"
        )
