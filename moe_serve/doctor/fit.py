"""What of a checkpoint fits into a machine's memory, and how fast a single stream can be at most.

Arithmetic over sizes and measured rates (docs/offload.md); loads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moe_serve.config.units import MIB
from moe_serve.doctor.rates import Rates
from moe_serve.execution.kv_cache import bytes_per_token
from moe_serve.execution.state_cache import bytes_per_sequence
from moe_serve.gguf_files.folder import listing_in
from moe_serve.hf import stand_ins
from moe_serve.hf.checkpoint import dense_codes_in, dense_tensors, open_all_experts, open_expert_file
from moe_serve.hf.config_file import read_config, scheme_in
from moe_serve.hf.dense import is_available
from moe_serve.hf.family import family_of
from moe_serve.hf.gguf_tensors import dense_bytes
from moe_serve.hf.leftovers import layer_of
from moe_serve.hf.loading import shapes_of
from moe_serve.resolve import EXPERT_SHARE_OF_FREE, KV_SHARE_OF_FREE
from moe_serve.spec import ModelSpec

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Sizes:
    """A checkpoint's sizes, as they lie in the device's memory."""

    dense_bytes: int
    expert_bytes: int
    """Of one expert."""
    num_layers: int
    """With experts."""
    num_experts: int
    """Of one layer."""
    top_k: int
    kv_bytes_per_token: int
    context: int
    state_bytes_per_sequence: int = 0
    """Of recurrent layers, whatever the length."""

    @property
    def all_experts_bytes(self) -> int:
        return self.expert_bytes * self.num_layers * self.num_experts

    @property
    def token_expert_bytes(self) -> int:
        """Experts that one token goes through."""
        return self.expert_bytes * self.num_layers * self.top_k


@dataclass(frozen=True, slots=True)
class Fit:
    """How a machine can hold a model, and the bounds that follow."""

    dense_fits: bool
    all_experts_fit: bool
    moe_cache_mib: int | None
    """What to give the experts; None: all are in memory without a cache."""
    cached_frac: float
    context_fits: bool
    memory_bound_tokens_per_s: float
    """If every expert that is needed were there: bytes of a token over the memory's rate. A model that the CPU's
    caches hold is faster."""
    tokens_per_s: float | None
    """With the misses of an even load read from disk; None: they would come from a disk that was not measured."""


def sizes_of(folder: str, dtype: torch.dtype, device: torch.device = CPU, expert_file: str | None = None) -> Sizes:
    """Sizes of a checkpoint computed in `dtype` on `device`, its experts as in `expert_file` if there is one.

    CheckpointError as in loading.
    """
    hf_config = read_config(folder)
    spec = ModelSpec.from_hf(hf_config)
    store = open_all_experts(folder)
    if expert_file is not None:
        store = open_expert_file(expert_file, folder, list(store.decoder_layers), spec)
    kv_shapes, state_shapes = shapes_of(hf_config)
    saved = _saved_by_codes(expert_file) if expert_file is not None and is_available(device, dtype) else 0
    return Sizes(
        dense_bytes=_dense_bytes(folder, hf_config, spec, dtype, device) - saved,
        expert_bytes=store.expert_bytes,
        num_layers=len(store.layers),
        num_experts=store.num_experts,
        top_k=spec.top_k,
        kv_bytes_per_token=bytes_per_token(kv_shapes, dtype),
        context=spec.max_position_embeddings,
        state_bytes_per_sequence=bytes_per_sequence(state_shapes),
    )


def _dense_bytes(folder: str, hf_config: Any, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> int:
    """All of the model but the experts in memory: as stored, where kernels read that, else as values of `dtype`."""
    listing, scheme = listing_in(folder), scheme_in(folder, hf_config)
    stays_coded = stand_ins.are_available(device, dtype)
    if listing is not None:
        return dense_bytes(listing, dtype, stays_coded)
    tensors = dense_tensors(folder, family_of(hf_config), scheme)
    dense = sum(each.tensor.nbytes for each in tensors if layer_of(each.name, -1) < spec.num_layers)
    stays_bf16 = spec.dtype == torch.bfloat16 and is_available(device, dtype)
    as_stored = stays_bf16 or (scheme is not None and stays_coded)
    return dense if as_stored else dense * dtype.itemsize // spec.dtype.itemsize


def _saved_by_codes(expert_file: str) -> int:
    """Bytes that dense weights in 12-bit codes take less than in bf16."""
    dense = dense_codes_in(expert_file, is_checked=False).values()
    return sum(math.prod(each.shape) * torch.bfloat16.itemsize - each.num_bytes for each in dense)


def fit(sizes: Sizes, rates: Rates, free_bytes: int, is_cpu: bool) -> Fit:
    """`free_bytes`: of the device's memory, before anything is loaded. Shares are those of `serve` itself."""
    left = free_bytes - sizes.dense_bytes
    all_fit = sizes.all_experts_bytes <= left * EXPERT_SHARE_OF_FREE
    budget = max(sizes.expert_bytes, int(left * EXPERT_SHARE_OF_FREE))
    cached = 1.0 if all_fit else min(1.0, budget / sizes.all_experts_bytes)
    cache_mib = -(-sizes.all_experts_bytes // MIB) if all_fit else budget // MIB
    in_memory_s = (sizes.dense_bytes + sizes.token_expert_bytes) / rates.memory_bytes_per_s
    return Fit(
        dense_fits=left > 0,
        all_experts_fit=all_fit,
        moe_cache_mib=None if all_fit and is_cpu else cache_mib,
        cached_frac=cached,
        context_fits=sizes.kv_bytes_per_token * sizes.context <= left * KV_SHARE_OF_FREE,
        memory_bound_tokens_per_s=1 / in_memory_s,
        tokens_per_s=_with_misses(sizes, rates, cached, in_memory_s, is_cpu),
    )


def _with_misses(sizes: Sizes, rates: Rates, cached: float, in_memory_s: float, is_cpu: bool) -> float | None:
    """Reading overlaps computing at best in full, so the slower of the two is the bound.

    Misses as if every expert were used equally often, which is the worst case for a cache: real load is uneven.
    """
    missed_bytes = (1 - cached) * sizes.token_expert_bytes
    if not missed_bytes:
        return 1 / in_memory_s
    below = rates.disk_bytes_per_s if is_cpu else rates.h2d_bytes_per_s
    return None if below is None else 1 / max(in_memory_s, missed_bytes / below)
