"""The dense part of a quantised checkpoint: in codes, where kernels compute from these, or as floats.

Experts are left alone: they stay in the files. Raises CheckpointError naming a tensor that does not fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch

from expert_cache.storage.encoding import Encoding, Layout, Matrix
from expert_cache.storage.store import StoredTensor
from moe_serve.errors import CheckpointError
from moe_serve.hf.contradictions import FLOATS, settled
from moe_serve.hf.scheme import Scheme
from moe_serve.hf.stand_ins import StandIns
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from moe_serve_kernels.quantized import BITS

Offer = Callable[[str, Matrix], torch.Tensor | None]
"""StandIns.offer, or what never has one."""
TRANSPOSED: tuple[Layout, ...] = ("gptq", "awq")


def dense_state(
    tensors: Iterable[StoredTensor], scheme: Scheme, dtype: torch.dtype, stand_ins: StandIns | None = None
) -> dict[str, torch.Tensor]:
    """Name -> tensor as an unquantised checkpoint would have them: what was quantised in `dtype`, or a stand-in."""
    offer = (lambda name, matrix: None) if stand_ins is None else stand_ins.offer
    state: dict[str, torch.Tensor] = {}
    quantized: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for stored in tensors:
        found = scheme.split(stored.name)
        if found is not None:
            quantized[found[0]][found[1]] = stored
        elif not stored.name.endswith(scheme.unused):
            state[stored.name] = _kept(offer, stored.name, stored.tensor)
    for name, parts in quantized.items():
        if "codes" not in parts:
            raise CheckpointError(f"{parts.popitem()[1].name}: scales without a matrix in the *.safetensors files")
        codes = parts["codes"]
        if "scale" in parts:
            encoding = scheme.encoding_of(codes.tensor.dtype, name)
            matrix = _matrix(encoding, settled(parts, scheme))
            stand_in = offer(name, matrix)
            state[name] = as_tensor(matrix, dtype) if stand_in is None else stand_in
        elif codes.name == name and codes.tensor.dtype in FLOATS:
            state[name] = _kept(offer, name, codes.tensor)  # not quantised: what the config's `ignore` means
        else:
            raise CheckpointError(f"{codes.name}: no scales in the *.safetensors files")
    return state


def _kept(offer: Offer, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Floats as they are stored, or the stand-in of a matrix of them."""
    stand_in = offer(name, tensor) if tensor.ndim == 2 else None
    return tensor if stand_in is None else stand_in


def _matrix(encoding: Encoding, parts: Mapping[str, StoredTensor]) -> Matrix:
    tensors = {role: stored.tensor for role, stored in parts.items()}
    codes = tensors["codes"]
    columns = codes.shape[0 if encoding.layout in TRANSPOSED else 1] * _codes_per_entry(encoding)
    problem = mismatch(encoding, parts, _num_rows(encoding, codes), columns)
    if problem:
        raise CheckpointError(problem)
    return encoding.matrix(tensors, columns)


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
