"""One layer's attention on a GPU in few launches: product, rotation and page writes, attention, product.

The tokens of a step lie in one order: those that decode, then the prompts'. Each kind is one call, whatever its number.
Decoding alone is 5 launches, with latents 7 or 9. Knows layers and pages; nothing of experts.

Shape alphabet: T tokens, H hidden, Hq query and Hk key/value heads, D of a query, R of these rotary, Dv of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_serve.execution.forward_batch import DecodeGroup, ForwardBatch
from moe_serve.execution.kv_cache import LayerKV
from moe_serve.execution.step_memory import EXPANDED_BYTES
from moe_serve.hf.fused_weights import Fused, fuse
from moe_serve_kernels.cpu.decoder import DecoderShape
from moe_serve_kernels.gpu.add_norm import add_norm
from moe_serve_kernels.gpu.paged_attention import paged_decode
from moe_serve_kernels.gpu.prompt_attention import Prompt, Prompts, Rest, attend_to_prompts, tiles_of
from moe_serve_kernels.gpu.rotary import HeadNorms, Turns, rotate_heads, rotate_latents


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What all layers' attention needs of a step."""

    turns: Turns
    slots: torch.Tensor
    """[T] int64: where each token's key and value go."""
    groups: tuple[DecodeGroup, ...]
    prompts: Prompts | None
    """None: every token decodes."""

    def rows_of(self, group: DecodeGroup) -> slice:
        """A group's tokens among the step's."""
        return slice(group.first_row, group.first_row + group.num_seqs)


def step_of(batch: ForwardBatch, turns: Turns, heads_per_key: int, dtype: torch.dtype) -> AttentionStep:
    """`heads_per_key`: query heads that read the same keys; `dtype`: theirs."""
    return AttentionStep(turns, batch.kv_slots, batch.decode_groups, _prompts(batch, heads_per_key, dtype))


def _prompts(batch: ForwardBatch, heads_per_key: int, dtype: torch.dtype) -> Prompts | None:
    if not batch.prefill_runs:
        return None
    found, first_page = [], 0
    for run in batch.prefill_runs:
        found.append(Prompt(run.first_row, run.start, run.end, first_page))
        first_page += len(run.pages)
    tiles = torch.tensor(tiles_of(found, heads_per_key, dtype), dtype=torch.int32, device=batch.input_ids.device)
    return Prompts(tiles, torch.cat([run.pages for run in batch.prefill_runs]))


class HeadAttention:
    """Keys and values of every key/value head in the pages."""

    def __init__(self, module: Any, shape: DecoderShape, layer: LayerKV, window: int | None) -> None:
        self._qkv = fuse([module.q_proj, module.k_proj, module.v_proj])
        self._out = fuse([module.o_proj])
        norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        query_norm, key_norm = (None if norm is None else norm.weight.detach() for norm in norms)
        self._norms = HeadNorms(query_norm, key_norm, shape.norm_eps)
        sinks = getattr(module, "sinks", None)
        self._settings: dict[str, Any] = {
            "page_size": layer.page_size,
            "scale": float(shape.attention_scale),
            "window": window,
            "sinks": None if sinks is None else sinks.detach(),
        }
        self._layer = layer

    def run(self, hidden: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """hidden [T, H] -> [T, H]."""
        keys, values = self._layer.keys, self._layer.values
        query = rotate_heads(self._qkv(hidden), step.turns, self._norms, step.slots, keys, values)
        out = query.new_empty(*query.shape[:2], values.shape[2])
        for group in step.groups:
            rows = step.rows_of(group)
            tables = group.page_table, group.lengths
            paged_decode(query[rows], keys, values, *tables, **self._settings, out=out[rows])
        if step.prompts is not None:
            attend_to_prompts(query, keys, values, step.prompts, out, **self._settings)
        return self._out(out.flatten(1))


class LatentAttention:
    """Latents in the pages (latent_attention.py): decoding attends to them, prompts to keys and values made of them."""

    def __init__(self, module: Any, shape: DecoderShape, layer: LayerKV) -> None:
        projections = module.latent_projections
        self._layer = layer
        self._heads: int = shape.heads
        self._plain, self._rank, self._turned = projections.plain, projections.rank, shape.rotary_dim
        self._value_dim: int = shape.value_dim
        self._up: torch.Tensor = projections.up
        self._settings: dict[str, Any] = {"page_size": layer.page_size, "scale": float(shape.attention_scale)}
        narrow = getattr(module, "q_a_proj", None)
        self._first = fuse([module.q_proj if narrow is None else narrow, module.kv_a_proj_with_mqa])
        self._query: Fused | None = None if narrow is None else fuse([module.q_b_proj])
        self._query_norm: Any = None if narrow is None else module.q_a_layernorm
        self._norm = module.kv_a_layernorm
        self._out = fuse([module.o_proj])

    def run(self, hidden: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """hidden [T, H] -> [T, H]."""
        query, latents = self._query_and_latents(hidden)
        wide = query.new_empty(len(query), self._heads, self._rank + self._turned)
        rotated = wide[..., self._rank :]
        norm, rows = self._norm, self._layer.keys
        eps = norm.variance_epsilon
        rotate_latents(query, latents, step.turns, norm.weight.detach(), eps, step.slots, rows, rotated)
        out = query.new_empty(len(query), self._heads, self._value_dim)
        for group in step.groups:
            own = step.rows_of(group)
            self._decode(query[own], wide[own], group, out[own])
        if step.prompts is not None:
            self._prefill(query, rotated, step.prompts, out)
        return self._out(out.flatten(1))

    def _query_and_latents(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, Hq, D] and [T, rank + R]."""
        query, latents = self._first(hidden).tensor_split([-(self._rank + self._turned)], dim=1)
        if self._query is not None:
            norm = self._query_norm
            query = self._query(add_norm(query, norm.weight.detach(), norm.variance_epsilon))
        return query.unflatten(1, (self._heads, self._plain + self._turned)), latents

    def _decode(self, query: torch.Tensor, wide: torch.Tensor, group: DecodeGroup, out: torch.Tensor) -> None:
        """query [N, Hq, D]; `wide` [N, Hq, rank + R], rotated already; fills `out` [N, Hq, Dv]."""
        into, back = self._up[:, : self._plain], self._up[:, self._plain :].transpose(1, 2)
        carried = wide[..., : self._rank].transpose(0, 1)
        torch.bmm(query[..., : self._plain].transpose(0, 1), into, out=carried)
        keys, values = self._layer.keys, self._layer.values
        attended = paged_decode(wide, keys, values, group.page_table, group.lengths, **self._settings)
        torch.bmm(attended.transpose(0, 1), back, out=out.transpose(0, 1))

    def _prefill(self, query: torch.Tensor, rotated: torch.Tensor, prompts: Prompts, out: torch.Tensor) -> None:
        """All prompts at once, some heads at a time where contexts are long."""
        dim = self._layer.keys.shape[2]
        by_page = self._layer.keys.view(-1, self._layer.page_size * dim)
        rows = by_page.index_select(0, prompts.pages).view(-1, dim)
        latents, shared = rows.tensor_split([self._rank], dim=1)
        gathered = Prompts(prompts.tiles, torch.arange(len(prompts.pages), device=rows.device))
        head_bytes = len(rows) * (self._plain + self._value_dim) * rows.element_size()
        step = max(1, min(self._heads, EXPANDED_BYTES // head_bytes))
        for first in range(0, self._heads, step):
            some = slice(first, min(first + step, self._heads))
            up = self._up[some]
            made = torch.nn.functional.linear(latents, up.flatten(0, 1)).unflatten(1, up.shape[:2]).transpose(0, 1)
            plain, values = made.tensor_split([self._plain], dim=2)
            own = query[:, some, : self._plain]
            rest = Rest(rotated[:, some], shared)
            attend_to_prompts(own, plain, values, gathered, out[:, some], **self._settings, rest=rest)
