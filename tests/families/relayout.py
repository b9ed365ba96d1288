"""Rewriting a checkpoint's files: the other expert layout, and damage of every kind.

Works on safetensors files alone; knows nothing of transformers or moe_serve.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

WEIGHTS = "model.safetensors"
PER_EXPERT = re.compile(r"(?P<moe>.*)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight$")
GATE, UP, DOWN = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")


def copy_with(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of the single-file checkpoint `source` whose tensors went through `change`."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    save_file(change(load_file(source / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def fuse_experts(tensors: Tensors) -> Tensors:
    """Per-expert matrices -> `mlp.experts.gate_up_proj` [E, 2I, H] and `.down_proj` [E, H, I]."""
    dense: Tensors = {}
    layers: dict[str, dict[tuple[int, str], torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = PER_EXPERT.match(name)
        if match:
            layers[match["moe"]][int(match["expert"]), match["part"]] = tensor
        else:
            dense[_renamed(name)] = tensor
    for moe, parts in layers.items():
        prefix = f"{_renamed(moe + '.')}experts"
        dense[f"{prefix}.gate_up_proj"] = _stack(parts, GATE, UP)
        dense[f"{prefix}.down_proj"] = _stack(parts, DOWN)
    return dense


def _renamed(name: str) -> str:
    """Fused checkpoints use today's module names, not Mixtral's first ones."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def _stack(parts: dict[tuple[int, str], torch.Tensor], *wanted: tuple[str, ...]) -> torch.Tensor:
    """[E, sum of rows, in]: each expert's `wanted` matrices one above the other."""
    experts = sorted({expert for expert, _ in parts})
    names = [next(n for n in aliases if (0, n) in parts) for aliases in wanted]
    return torch.stack([torch.cat([parts[e, n] for n in names]) for e in experts])


def split_experts(tensors: Tensors) -> Tensors:
    """Fused [E, 2I, H] and [E, H, I] tensors -> `experts.N.{gate,up,down}_proj.weight`."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            split |= _per_expert(name, "gate_proj", gate) | _per_expert(name, "up_proj", up)
        elif name.endswith(".experts.down_proj"):
            split |= _per_expert(name, "down_proj", tensor)
        else:
            split[name] = tensor
    return split


def _per_expert(fused_name: str, part: str, stacked: torch.Tensor) -> Tensors:
    prefix = fused_name.rsplit(".", 1)[0]
    return {f"{prefix}.{e}.{part}.weight": matrix.contiguous() for e, matrix in enumerate(stacked)}


def reshard(source: Path, folder: Path, num_shards: int) -> Path:
    """A copy in `num_shards` files with an index, tensors dealt out in turn."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / WEIGHTS).unlink()
    shards: list[Tensors] = [{} for _ in range(num_shards)]
    weight_map = {}
    for i, (name, tensor) in enumerate(sorted(load_file(source / WEIGHTS).items())):
        shards[i % num_shards][name] = tensor
        weight_map[name] = shard_name(i % num_shards, num_shards)
    for i, shard in enumerate(shards):
        save_file(shard, folder / shard_name(i, num_shards), metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def shard_name(index: int, count: int) -> str:
    """transformers' naming, counted from one."""
    return f"model-{index + 1:05}-of-{count:05}.safetensors"
