"""The dense part of a quantised checkpoint as floats: attention, routers and shared experts run through torch.

Experts are left alone: they stay in the files. Raises CheckpointError naming a tensor that does not fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from expert_cache.storage.encoding import Encoding, Layout
from expert_cache.storage.store import StoredTensor
from moe_serve.errors import CheckpointError
from moe_serve.hf.contradictions import FLOATS, settled
from moe_serve.hf.quantization_scheme import Scheme
from moe_serve_kernels.quantized import BITS

TRANSPOSED: tuple[Layout, ...] = ("gptq", "awq")


def dense_state(tensors: Iterable[StoredTensor], scheme: Scheme, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Name -> tensor as an unquantised checkpoint would have them; what was quantised in `dtype`."""
    state: dict[str, torch.Tensor] = {}
    quantized: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for stored in tensors:
        found = scheme.split(stored.name)
        if found is not None:
            quantized[found[0]][found[1]] = stored
        elif not stored.name.endswith(scheme.unused):
            state[stored.name] = stored.tensor
    for name, parts in quantized.items():
        if "codes" not in parts:
            raise CheckpointError(f"{parts.popitem()[1].name}: scales without a matrix in the *.safetensors files")
        codes = parts["codes"]
        if "scale" in parts:
            encoding = scheme.encoding_of(codes.tensor.dtype)
            state[name] = _dequantized(encoding, settled(parts, scheme), dtype)
        elif codes.name == name and codes.tensor.dtype in FLOATS:
            state[name] = codes.tensor  # not quantised: what the config's `ignore` means
        else:
            raise CheckpointError(f"{codes.name}: no scales in the *.safetensors files")
    return state


def _dequantized(encoding: Encoding, parts: Mapping[str, StoredTensor], dtype: torch.dtype) -> torch.Tensor:
    tensors = {role: stored.tensor for role, stored in parts.items()}
    codes = tensors["codes"]
    columns = codes.shape[0 if encoding.layout in TRANSPOSED else 1] * _codes_per_entry(encoding)
    problem = mismatch(encoding, parts, _num_rows(encoding, codes), columns)
    if problem:
        raise CheckpointError(problem)
    matrix = encoding.matrix(tensors, columns)
    return matrix.to(dtype) if isinstance(matrix, torch.Tensor) else matrix.dequantized(dtype)


def _codes_per_entry(encoding: Encoding) -> int:
    """Columns in one entry of the dimension that runs along them."""
    if encoding.layout in ("packed", "gptq"):
        return 32 // BITS[encoding.kind]
    if encoding.layout == "rows":
        return 8 // BITS[encoding.kind]
    return 32 if encoding.layout == "blocks" else 1


def _num_rows(encoding: Encoding, codes: torch.Tensor) -> int:
    if encoding.layout == "gptq":
        return codes.shape[1]
    return codes.shape[1] * 8 if encoding.layout == "awq" else codes.shape[0]


def mismatch(encoding: Encoding, parts: Mapping[str, StoredTensor], rows: int, columns: int) -> str | None:
    """What is wrong with the tensors of a matrix that must be [rows, columns], or None."""
    codes = parts.get("codes")
    if codes is not None and codes.tensor.dtype not in encoding.code_dtypes:
        return f"{codes.name} is stored as {str(codes.tensor.dtype)[6:]}, but config.json asks for {encoding.kind}"
    for role, wanted in encoding.shapes(rows, columns).items():
        if role not in parts:
            continue
        shape = tuple(parts[role].tensor.shape)
        one_scale = role in ("scale", "factor") and torch.Size(wanted).numel() == parts[role].tensor.numel()
        if shape != wanted and not one_scale:
            return f"{parts[role].name} has shape {shape}, but config.json asks for {wanted}"
    return None
