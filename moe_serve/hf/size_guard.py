"""Sizes that config.json names against those of the files, before a model of them takes memory.

transformers makes room for what it does not find: a size that is wrong by a factor of a million would end the process.
Knows names and shapes; reads no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

from moe_serve.errors import CheckpointError
from moe_serve.hf.composites import OTHER_TOWERS
from moe_serve.hf.family import FURTHER
from moe_serve.hf.leftovers import LAYER

Shape = tuple[int, ...]
CODES_PER_BYTE = 2
"""At most: four bits each."""


def refuse_wrong_sizes(
    folder: str,
    files: Iterable[Path],
    names: Iterable[str],
    num_layers: int,
    shapes_of_model: Callable[[], Mapping[str, Shape]],
) -> None:
    """CheckpointError names a tensor that config.json wants larger than all files, or the layers that are missing.

    Other shapes that do not match are found when the model is filled.

    `shapes_of_model`: by name, as config.json has them; asked once the layers are counted.
    """
    num_bytes = sum(file.stat().st_size for file in files)
    refuse_missing_layers(folder, names, num_layers)
    for name, wanted in shapes_of_model().items():
        if prod(wanted) > CODES_PER_BYTE * num_bytes:
            raise CheckpointError(
                f"{folder}: config.json asks for {name} of shape {wanted}, more than all *.safetensors files hold"
            )


def refuse_missing_layers(folder: str, names: Iterable[str], num_layers: int) -> None:
    """CheckpointError where config.json names more layers than the tensors do."""
    own = (name for name in names if OTHER_TOWERS.search(name) is None and FURTHER.search(name) is None)
    found = {int(layer[1]) for name in own if (layer := LAYER.search(name))}
    if found and num_layers > max(found) + 1:
        raise CheckpointError(
            f"{folder}: num_hidden_layers is {num_layers} in config.json, but the *.safetensors files have"
            f" {max(found) + 1} layers"
        )
