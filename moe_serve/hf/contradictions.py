"""Where a quantisation config and the tensors disagree: the tensors decide, or an error names field and tensor.

A config may have been copied, or written by another version of a tool. Zero points that differ from the symmetric one
and columns out of order are then in the tensors alone. Reads their values, which are about 2 % of a checkpoint of GPTQ.
Knows roles of tensors; knows no method's field names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from expert_cache.storage.encoding import ROLES, unpack
from expert_cache.storage.store import LayerTensors, StoredTensor, part_name
from moe_serve.errors import CheckpointError
from moe_serve.hf.scheme import Scheme
from moe_serve_kernels.quantized import BITS

Parts = dict[tuple[str, int | None], StoredTensor]
MATRICES = ("gate", "up", "gate_up", "down")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of a matrix that was not quantised; fp8 without a scale is none of them."""
SETTLED = ("zero", "order")
"""Roles of tensors that may say nothing new."""


def settled_experts(folder: str, layers: Mapping[int, LayerTensors], scheme: Scheme) -> dict[int, Parts]:
    """All layers' tensors less those that say nothing new. An expert file needs all experts alike: a role goes or stays
    for all of them. CheckpointError: a tensor that the config or another expert's tensors promise is not there."""
    matrices = [found for parts in layers.values() for found in _matrices_in(parts)]
    is_scaled = any("scale" in found for found in matrices)
    for found in matrices:
        if "scale" not in found and (is_scaled or found["codes"].tensor.dtype not in FLOATS):
            raise CheckpointError(f"{folder}: no scales for {found['codes'].name} in the *.safetensors files")
        if is_scaled:
            _refuse_missing(found, scheme)
    gone = _redundant_roles((item for found in matrices for item in found.items()), scheme)
    return {
        layer: {key: tensor for key, tensor in parts.items() if _role_of(key[0]) not in gone}
        for layer, parts in layers.items()
    }


def settled(parts: Mapping[str, StoredTensor], scheme: Scheme) -> dict[str, StoredTensor]:
    """One matrix's tensors by role, in the same way."""
    _refuse_missing(parts, scheme)
    gone = _redundant_roles(parts.items(), scheme)
    return {role: stored for role, stored in parts.items() if role not in gone}


def refuse_zero_points(tensors: Iterable[StoredTensor], scheme: Scheme) -> None:
    """CheckpointError names zero points that are left unread although they are not zero."""
    for stored in tensors:
        if scheme.all_zero and stored.name.endswith(scheme.all_zero) and stored.tensor.any():
            raise CheckpointError(f"{stored.name} holds zero points, but {scheme.symmetric_field}")


def _matrices_in(parts: LayerTensors) -> Iterator[dict[str, StoredTensor]]:
    """Tensors by role; biases are no matrices."""
    for part, expert in parts:
        if part in MATRICES:
            names = {role: (part_name(part, role), expert) for role in ROLES}
            yield {role: parts[key] for role, key in names.items() if key in parts}


def _role_of(part: str) -> str:
    end = part.rsplit("_", 1)[-1]
    return end if end in ROLES else "codes"


def _refuse_missing(parts: Mapping[str, StoredTensor], scheme: Scheme) -> None:
    for role, promise in scheme.promised.items():
        if role not in parts and "codes" in parts:
            raise CheckpointError(f"{parts['codes'].name}: {promise}, but the files hold no {_suffix_of(role, scheme)}")


def _suffix_of(role: str, scheme: Scheme) -> str:
    return next(suffix.lstrip(".") for suffix, each in scheme.suffixes.items() if each == role)


def _redundant_roles(tensors: Iterable[tuple[str, StoredTensor]], scheme: Scheme) -> set[str]:
    """Those of SETTLED without a tensor that says something."""
    gone = set(SETTLED)
    for role, stored in tensors:
        if role == "order":
            _check_groups(stored, scheme)
        if role in gone and not _says_nothing(role, stored.tensor, scheme):
            gone.remove(role)
    return gone


def _says_nothing(role: str, tensor: torch.Tensor, scheme: Scheme) -> bool:
    encoding = scheme.encoding
    if role == "order":
        columns = tensor.shape[-1]
        return torch.equal(tensor.long(), torch.arange(columns) // (encoding.group or columns))
    if not scheme.is_symmetric:
        return False
    values = unpack(tensor, encoding.kind)
    middle = 1 << (BITS[encoding.kind] - 1)
    first = int(values.flatten()[0]) if values.numel() else middle
    return first in (middle - 1, middle) and bool((values == first).all())  # the two forms are confused in the wild


def _check_groups(stored: StoredTensor, scheme: Scheme) -> None:
    groups, order = scheme.encoding.num_groups(stored.tensor.shape[-1]), stored.tensor
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise CheckpointError(f"{stored.name} names a group beyond the {groups} that config.json's group size makes")
