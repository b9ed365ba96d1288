"""Whether a checkpoint's expert tensors are all there, and as large as its config says.

Looks at names, shapes and types; reads no values.
"""

from __future__ import annotations

from collections.abc import Mapping

from expert_cache.storage.encoding import ROLES
from expert_cache.storage.store import ExpertStore, StoredTensor, part_name
from moe_serve.errors import CheckpointError
from moe_serve.hf.family import Family
from moe_serve.hf.quantized_dense import mismatch
from moe_serve.spec import ModelSpec
from moe_serve_kernels.quantized import row_bytes

Parts = dict[tuple[str, int | None], StoredTensor]
"""One layer's tensors by (part, expert)."""


def check_present(where: str, expert: int, parts: Parts) -> None:
    """CheckpointError where a layer's tensors lack a projection of an expert."""

    def has(part: str) -> bool:
        return (part, expert) in parts or ((part, None) in parts and expert < parts[part, None].tensor.shape[0])

    wanted = ("gate", "up", "down") if any(p == "gate" for p, _ in parts) else ("gate_up", "down")
    missing = [part for part in wanted if not has(part)]
    if missing:
        raise CheckpointError(f"{where}: no {' and no '.join(missing)} projection in the *.safetensors files")


def check_shapes(folder: str, store: ExpertStore, spec: ModelSpec) -> None:
    """Every expert must have the shape config.json gives it, or a request would find out."""
    inner, hidden = spec.expert_intermediate_size, spec.expert_hidden_size
    for layer in store.layers:
        for expert in range(store.num_experts):
            where = f"{folder}: {store.name(layer, expert)}"
            if any(stored.block_type is not None for stored in store.parts(layer, expert).values()):
                _check_blocks(where, store.parts(layer, expert), spec)
                continue
            if store.encoding is not None:
                _check_quantized(where, store, store.parts(layer, expert), spec)
                continue
            weights = store.weights(layer, expert)
            for part, wanted in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                found = tuple(getattr(weights, part).shape)
                if found != wanted:
                    raise CheckpointError(
                        f"{where}: the {part} projection has shape {found}, but config.json asks for {wanted}"
                    )


def _check_quantized(where: str, store: ExpertStore, tensors: Mapping[str, StoredTensor], spec: ModelSpec) -> None:
    """Without decoding: that can mean copying."""
    assert store.encoding is not None
    for part, shape in _shapes_of(spec).items():
        parts = {role: tensors[name] for role in ROLES if (name := part_name(part, role)) in tensors}
        if parts and "scale" not in parts:
            raise CheckpointError(f"{where}: no scales for {parts['codes'].name} in the *.safetensors files")
        problem = mismatch(store.encoding, parts, *shape)
        if problem:
            raise CheckpointError(f"{where}: {problem}")


def _check_blocks(where: str, tensors: Mapping[str, StoredTensor], spec: ModelSpec) -> None:
    """Of a GGUF file, whose matrices may differ in type."""
    for part, (rows, columns) in _shapes_of(spec).items():
        stored = tensors.get(part)
        if stored is None:
            continue
        wanted = (rows, columns if stored.block_type is None else row_bytes(stored.block_type, columns))
        if tuple(stored.tensor.shape) != wanted:
            raise CheckpointError(
                f"{where}: {stored.name} is stored as {tuple(stored.tensor.shape)}, but the metadata asks for {wanted}"
            )


def _shapes_of(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """[outputs, inputs] of an expert's matrices."""
    inner, hidden = spec.expert_intermediate_size, spec.expert_hidden_size
    return {"gate": (inner, hidden), "up": (inner, hidden), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}


def is_transposed(family: Family, parts: Parts, spec: ModelSpec) -> bool:
    """Whether matrices are stored [in, out]: as the family says, else by the shape of one that is not square."""
    if family.transposed is not None:
        return family.transposed
    inner, hidden = spec.expert_intermediate_size, spec.expert_hidden_size
    wanted = {"down": (hidden, inner), "gate_up": (2 * inner, hidden)}
    shapes = [(tuple(t.tensor.shape[-2:]), wanted[part]) for (part, _), t in parts.items() if part in wanted]
    return any(found != shape and found == shape[::-1] for found, shape in shapes)
