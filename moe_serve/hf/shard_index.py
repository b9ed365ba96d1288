"""The index of a sharded checkpoint: which file holds which tensor, and whether the files agree.

transformers loads what the files hold, whatever the index says: a shard from another version of the checkpoint would
answer without a word. Knows names; reads no tensors.
"""

from __future__ import annotations

from pathlib import Path

from moe_serve.config.model_folder import read_object
from moe_serve.errors import CheckpointError
from moe_serve_base.safetensors_header import read_header

INDEX = "model.safetensors.index.json"


def read_index(folder: str | Path) -> dict[str, str] | None:
    """Tensor -> file name; None without an index. CheckpointError: it is not one."""
    path = Path(folder) / INDEX
    if not path.is_file():
        return None
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must be an object of file names")
    return weight_map


def refuse_false_index(folder: str | Path) -> None:
    """CheckpointError names a tensor that its shard does not hold, or that a shard holds and the index does not name.

    A file that is missing or damaged is left to what reads it.
    """
    weight_map = read_index(folder) or {}
    for shard in sorted(set(weight_map.values())):
        file = Path(folder) / shard
        try:
            held = read_header(file)[0].keys() - {"__metadata__"}
        except (OSError, ValueError, AttributeError):
            continue
        named = {tensor for tensor, place in weight_map.items() if place == shard}
        if missing := sorted(named - held):
            raise CheckpointError(f"{file}: {INDEX} places {missing[0]} in this shard, which does not hold it")
        if unnamed := sorted(held - named):
            where = weight_map.get(unnamed[0])
            says = f"places it in {where}" if where else "does not name it"
            raise CheckpointError(f"{file}: this shard holds {unnamed[0]}, but {INDEX} {says}")
