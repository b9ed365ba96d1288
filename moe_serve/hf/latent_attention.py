"""Latent attention (DeepSeek-V2): a layer caches a token's latents, not the keys and values that could be made of them.

A row is [latents; rotary values], one for all heads: 576 numbers where V2-Lite's keys and values would be 5,120 and
V3's 40,960. Decoding attends to the rows themselves: queries are carried over to the latents' space, and what they
attend to is carried back. Prompts, whose queries are many, make keys and values of the context, some heads at a time.
vLLM and SGLang do the same.

Shape alphabet: T tokens, N sequences, C of a context, Hq heads, D of a query, R of these rotary, Dv of a value.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import nn

from moe_serve.execution.forward_batch import DecodeGroup, PrefillRun
from moe_serve.execution.kv_cache import LayerKV
from moe_serve.hf.attend import Attend
from moe_serve.hf.dense import StoredLinear
from moe_serve_kernels.cpu import expert_mlp
from moe_serve_kernels.cpu import paged_attention as native
from moe_serve_kernels.cpu.latent_heads import LatentHeads

KERNELS_READ = (torch.float32, torch.bfloat16)
"""Dtypes of weights."""
EXPANDED_BYTES = 64 << 20
"""Keys and values that may be made at a time: more heads at once are hardly faster."""


class Heads(Protocol):
    """What carries one layer's heads over to latents, and back; shapes are those of `LatentHeads`."""

    def carry_over(self, query: torch.Tensor) -> torch.Tensor: ...
    def carry_back(self, attended: torch.Tensor) -> torch.Tensor: ...
    def expand(self, latents: torch.Tensor, first: int, count: int) -> torch.Tensor: ...


class TorchHeads:
    """One layer's heads on any device, in the dtype of their weights."""

    def __init__(self, up: torch.Tensor, plain: int) -> None:
        """`up` [Hq, plain + Dv, rank]."""
        self._up = up
        self._into, self._back = up[:, :plain], up[:, plain:].transpose(1, 2)

    def carry_over(self, query: torch.Tensor) -> torch.Tensor:
        return torch.bmm(query, self._into)

    def carry_back(self, attended: torch.Tensor) -> torch.Tensor:
        return torch.bmm(attended, self._back)

    def expand(self, latents: torch.Tensor, first: int, count: int) -> torch.Tensor:
        rows = self._up[first : first + count].flatten(0, 1)
        return nn.functional.linear(latents, rows).view(len(latents), count, -1)


class LatentProjections:
    """One attention module's weights between latents and heads; its model must not be moved once they were used."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention
        self.num_heads: int = attention.num_heads
        self.plain: int = attention.qk_nope_head_dim
        self.rank: int = attention.kv_lora_rank
        self.value_dim: int = attention.v_head_dim

    @functools.cached_property
    def heads(self) -> Heads:
        """Made once, when they are first needed: then the weights lie where they stay."""
        return self.make_heads()

    @property
    def up(self) -> torch.Tensor:
        """[Hq, plain + Dv, rank]: of each head the keys' values that are not rotated, then the values."""
        weight: torch.Tensor = self._attention.kv_b_proj.weight.detach()
        return weight.view(self.num_heads, self.plain + self.value_dim, self.rank)

    def make_heads(self) -> Heads:
        """For the kernels where these read such weights."""
        layer, up = self._attention.kv_b_proj, self.up
        if up.dtype in KERNELS_READ and expert_mlp.is_available(up.device, expert_mlp.weight_kind(up), torch.float32):
            return LatentHeads(up, self.plain, rounds=isinstance(layer, StoredLinear) and layer.rounds)
        return TorchHeads(up, self.plain)


def install(model: nn.Module) -> None:
    """Have every latent attention of a model hand over latents, with a `latent_projections` beside them."""
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            attention: Any = module
            attention.latent_projections = LatentProjections(attention)
            attention.expand_kv = _keep_latents


def _keep_latents(latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of transformers' `expand_kv`: [1, 1, T, rank], [1, 1, T, R] -> rows, and their beginnings."""
    return torch.cat([latents, rotary], dim=-1), latents


class AttendToLatents:
    """One layer's attention, as `Attend`, with queries and values of all heads on rows that they share."""

    def __init__(self, attend: Attend, projections: LatentProjections) -> None:
        assert attend.scaling is not None
        assert attend.sinks is None
        self._attend = attend
        self._projections = projections

    def decode(self, query: torch.Tensor, layer: LayerKV, group: DecodeGroup) -> torch.Tensor:
        """query [Hq, N, D] -> [N, Hq, Dv]."""
        return self.carried_back(self._attend.decode(self.carried_over(query), layer, group))

    def carried_over(self, query: torch.Tensor) -> torch.Tensor:
        """[Hq, T, D] -> [Hq, T, rank + R]."""
        plain = self._projections.plain
        return torch.cat([self._projections.heads.carry_over(query[..., :plain]), query[..., plain:]], dim=-1)

    def carried_back(self, attended: torch.Tensor) -> torch.Tensor:
        """[T, Hq, rank] -> [T, Hq, Dv]."""
        return self._projections.heads.carry_back(attended.transpose(0, 1)).transpose(0, 1)

    def prefill(self, query: torch.Tensor, layer: LayerKV, run: PrefillRun) -> torch.Tensor:
        """query [Hq, count, D] -> [count, Hq, Dv], causal over a context of run.end tokens."""
        if native.is_available(layer.keys.device, layer.keys.dtype):
            return self.carried_back(self._attend.prefill(self.carried_over(query), layer, run))
        rows = layer.gather(run.pages[None])[0][0, 0, : run.end]
        step = self._heads_at_once(query, run)
        parts = [self._prefill(part, rows, run, first * step) for first, part in enumerate(torch.split(query, step))]
        return torch.cat(parts, dim=1)

    def _heads_at_once(self, query: torch.Tensor, run: PrefillRun) -> int:
        head_bytes = run.end * (query.shape[-1] + self._projections.value_dim) * query.element_size()
        return max(1, min(len(query), EXPANDED_BYTES // head_bytes))

    def _prefill(self, query: torch.Tensor, rows: torch.Tensor, run: PrefillRun, first: int) -> torch.Tensor:
        """`query`: of the heads from `first` on."""
        projections = self._projections
        latents, rotary = rows.tensor_split([projections.rank], dim=-1)
        made = projections.heads.expand(latents, first, len(query)).transpose(0, 1)
        plain, values = made.tensor_split([projections.plain], dim=-1)
        keys = torch.cat([plain, rotary.expand(len(query), -1, -1)], dim=-1)
        return self._attend.attend_to_context(query, keys, values, run)
