"""A trained predictor as a file: what was learnt, the method's name, and the model whose routes it was learnt from.

A safetensors file; the rest is in its metadata. A predictor of another model would guess at random, so `load` refuses
one. Knows numpy only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as as_bytes

from moe_serve_base.extensions import ExtensionError
from moe_serve_base.whole_files import whole_file
from predictors.methods import find_method
from predictors.predictor import Predictor, RouterShape

FORMAT = "moe-serve predictor 1"


class PredictorFileError(ValueError):
    """A predictor file that cannot be used. The message names the file and the fix."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


@dataclass(frozen=True)
class PredictorFile:
    """What a file holds."""

    method: str
    shape: RouterShape
    fingerprint: str | None
    """Of the checkpoint, as the trace named it; None if it did not."""
    predictor: Predictor


def save(path: str | Path, method: str, predictor: Predictor, shape: RouterShape, fingerprint: str | None) -> None:
    """Write the file. OutputError (an OSError) where it cannot be written."""
    facts: dict[str, Any] = {
        "method": method,
        "num_layers": shape.num_layers,
        "layer_ids": list(shape.layer_ids),
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "fingerprint": fingerprint,
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in predictor.arrays().items()}
    with whole_file(Path(path)) as partial:
        partial.write_bytes(as_bytes(arrays, metadata={"format": FORMAT, "facts": json.dumps(facts)}))


def load(path: str | Path, shape: RouterShape | None = None, fingerprint: str | None = None) -> PredictorFile:
    """Read the file; PredictorFileError if it is none, or not of the model with this shape and fingerprint."""
    facts, arrays = _read(path)
    # Files of before 0.2 hold no layer_ids; nothing that is learnt depends on them.
    layer_ids = tuple(facts.get("layer_ids") or range(facts["num_layers"]))
    found = RouterShape(layer_ids, facts["num_experts"], facts["top_k"])
    if shape is not None and found.sizes() != shape.sizes():
        raise PredictorFileError(path, f"was learnt from {_words(found)}, but this model has {_words(shape)}")
    if None not in (fingerprint, facts["fingerprint"]) and fingerprint != facts["fingerprint"]:
        raise PredictorFileError(path, "was learnt from another checkpoint; train one from a trace of this model")
    try:
        method = find_method(facts["method"])
    except ExtensionError as error:
        raise PredictorFileError(path, f"{error}; install the package that it was trained with") from error
    try:
        predictor = method.from_arrays(found, arrays)
    except (KeyError, ValueError) as error:
        raise PredictorFileError(path, f"is damaged or of another version ({error}); train it again") from None
    return PredictorFile(facts["method"], found, facts["fingerprint"], predictor)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise PredictorFileError(path, "is no predictor; make one with `moe-serve predictor train`")
            names = list(file.keys())
            return json.loads(metadata["facts"]), {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise PredictorFileError(path, "does not exist; check the path") from None
    except (SafetensorError, OSError) as error:
        raise PredictorFileError(path, f"is no safetensors file ({error})") from None


def _words(shape: RouterShape) -> str:
    return f"{shape.num_layers} layers of {shape.num_experts} experts, top-{shape.top_k}"
