"""Chunked attention (Llama 4): a token sees its own chunk of the sequence, up to itself.

transformers applies it through masks alone. For one query it is a window whose size depends on the position.

Shape alphabet: N sequences, Hq query heads, D head dim, C context length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_serve.execution.forward_batch import DecodeGroup, PrefillRun
from moe_serve.execution.kv_cache import LayerKV
from moe_serve.hf.attend import Attend, additive

CHUNKED = "chunked_attention"


class AttendToChunk(Attend):
    """As `Attend`, within chunks of `chunk` tokens counted from the sequence's first."""

    def __init__(self, scaling: float | None, chunk: int, sinks: torch.Tensor | None) -> None:
        super().__init__(scaling, None, sinks)
        self._chunk = chunk

    def decode(self, query: torch.Tensor, layer: LayerKV, group: DecodeGroup) -> torch.Tensor:
        """query [Hq, N, D] -> [N, Hq, Dv]."""
        if group.max_length <= self._chunk:
            return super().decode(query, layer, group)
        return torch.cat([self._decode_one(query[:, i : i + 1], layer, one) for i, one in enumerate(group.singly())])

    def _decode_one(self, query: torch.Tensor, layer: LayerKV, group: DecodeGroup) -> torch.Tensor:
        seen = (group.max_length - 1) % self._chunk + 1
        return Attend(self.scaling, seen, self.sinks).decode(query, layer, group)

    def _pieces(self, run: PrefillRun) -> list[tuple[int, int]]:
        edges = range(run.start // self._chunk * self._chunk, run.end, self._chunk)
        return [(max(edge, run.start), edge) for edge in edges]

    def attend_to_context(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: PrefillRun
    ) -> torch.Tensor:
        if run.end <= self._chunk:
            return super().attend_to_context(query, keys, values, run)
        out = self._attention(query[None], keys[None], values[None], self._mask(run, query.dtype))
        return out[0].transpose(0, 1)

    def _mask(self, run: PrefillRun, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [count, C] for queries at positions start .. end-1."""
        key = (CHUNKED, self._chunk)
        if key not in run.masks:
            key_pos = torch.arange(run.end, device=run.pages.device)[None]
            query_pos = torch.arange(run.start, run.end, device=run.pages.device)[:, None]
            hidden = (key_pos > query_pos) | (key_pos // self._chunk < query_pos // self._chunk)
            run.masks[key] = additive(hidden, dtype)
        return run.masks[key]


def install(model: nn.Module, config: Any) -> None:
    """Tell each attention module of a chunked layer how long its chunks are (`attention_chunk`).

    A config keeps fields that its class does not know, and their models do not read them: no more do we.
    """
    chunk = config.attention_chunk_size if hasattr(type(config), "attention_chunk_size") else None
    kinds = getattr(config, "layer_types", None) or [CHUNKED] * config.num_hidden_layers
    modules: list[Any] = list(model.modules()) if chunk else []
    for module in modules:
        if hasattr(module, "q_proj") and hasattr(module, "layer_idx") and kinds[int(module.layer_idx)] == CHUNKED:
            module.attention_chunk = chunk
