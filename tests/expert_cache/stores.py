"""Small expert stores on real files, in the layouts that checkpoints have, and a plain loop to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from expert_cache.storage.encoding import Matrix
from expert_cache.storage.safetensors_file import stored_tensors
from expert_cache.storage.store import ExpertStore, FusedLayout, StoredTensor
from moe_serve_kernels.cpu.expert_mlp import Activation, activate
from predictors.shape import MoELayer

E, H, INNER = 5, 48, 40
DECODER_LAYERS = (3, 7)
LAYERS = FIRST, SECOND = MoELayer(0), MoELayer(1)
SILU = Activation("silu")
CLAMPED = Activation("clamped_swiglu", 1.5, 2.0)


def matrices(layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    gate, up = (torch.randn(E, INNER, H, generator=generator) * 0.3 for _ in range(2))
    return gate, up, torch.randn(E, H, INNER, generator=generator) * 0.3


Part = tuple[str, int | None]
"""What a tensor is, and of which expert; None: of all."""


def plain(matrix: Matrix) -> torch.Tensor:
    """A matrix that is not quantised."""
    assert isinstance(matrix, torch.Tensor)
    return matrix


def split_store(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertStore:
    """One 2-D tensor per expert and matrix, as Mixtral's published files; one file per layer."""
    tensors: dict[int, dict[Part, StoredTensor]] = {}
    for layer in DECODER_LAYERS:
        gate, up, down = (m.to(dtype) for m in matrices(layer))
        parts: dict[str, torch.Tensor] = {}
        for e in range(E):
            parts |= {f"{e}.gate": gate[e], f"{e}.up": up[e], f"{e}.down": down[e]}
        file = folder / f"layer{layer}.safetensors"
        save_file({k: v.contiguous() for k, v in parts.items()}, file)
        tensors[layer] = {(t.name.split(".")[1], int(t.name.split(".")[0])): t for t in stored(file)}
    return ExpertStore(tensors, E)


def fused_store(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertStore:
    """One 3-D tensor per layer and matrix, gate and up stacked, as Granite's."""
    tensors: dict[int, dict[Part, StoredTensor]] = {}
    for layer in DECODER_LAYERS:
        gate, up, down = (m.to(dtype) for m in matrices(layer))
        file = folder / f"layer{layer}.safetensors"
        save_file({"gate_up": torch.cat([gate, up], 1).contiguous(), "down": down.contiguous()}, file)
        tensors[layer] = {(t.name, None): t for t in stored(file)}
    return ExpertStore(tensors, E)


def gpt_oss_store(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertStore:
    """Transposed, interleaved, with biases."""
    tensors: dict[int, dict[Part, StoredTensor]] = {}
    for layer in DECODER_LAYERS:
        gate, up, down = (m.to(dtype) for m in matrices(layer))
        parts = {
            "gate_up": torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous(),
            "down": down.transpose(1, 2).contiguous(),
            "gate_up_bias": (torch.arange(E * 2 * INNER).view(E, 2 * INNER) * 0.01).to(dtype),
            "down_bias": (torch.arange(E * H).view(E, H) * 0.01).to(dtype),
        }
        file = folder / f"layer{layer}.safetensors"
        save_file(parts, file)
        tensors[layer] = {(t.name, None): t for t in stored(file)}
    return ExpertStore(tensors, E, FusedLayout(transposed=True, interleaved=True))


STORES: dict[str, tuple[Callable[..., ExpertStore], Activation]] = {
    "split": (split_store, SILU),
    "fused": (fused_store, SILU),
    "gpt_oss": (gpt_oss_store, CLAMPED),
}


def stored(file: Path) -> list[StoredTensor]:
    return list(stored_tensors(file, lambda name: True))


def routing(tokens: int, choices: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [T, H], ids [T, K], weights [T, K]), the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:choices] for _ in range(tokens)])
    return torch.randn(tokens, H, generator=generator), ids, torch.rand(tokens, choices, generator=generator)


def expected(
    store: ExpertStore,
    activation: Activation,
    layer: MoELayer,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    inner_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """[T, H] in float64, one (token, choice) at a time; `inner_dtype`: what `down` is given is rounded to it."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t in range(hidden.shape[0]):
        for k in range(ids.shape[1]):
            w = store.weights(layer, int(ids[t, k]))
            biases = [None if b is None else b.double() for b in (w.gate_bias, w.up_bias, w.down_bias)]
            wide = [plain(matrix).double() for matrix in (w.gate, w.up, w.down)]
            x = hidden[t].double()
            gate, up = F.linear(x, wide[0], biases[0]), F.linear(x, wide[1], biases[1])
            inner = activate(activation, gate, up).to(inner_dtype).double()
            out[t] += weights[t, k].double() * F.linear(inner, wide[2], biases[2])
    return out
