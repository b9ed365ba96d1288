"""Sparse attention (DeepSeek-V3.2, GLM-5): an indexer chooses the tokens that a query sees, once there are more than
`index_topk`.

transformers' own indexer scores and chooses; it is asked for one sequence at a time, when the step's pages are known.
The keys that it compares with lie beside the latents in the same pages. Layers without an indexer take the choice of
the last layer that has one.

Shape alphabet: T tokens in the step, N sequences, C of a context, Hq heads, D of a query, K tokens chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.overrides import TorchFunctionMode

from moe_serve.execution.forward_batch import DecodeGroup, PrefillRun
from moe_serve.execution.kv_cache import LayerKV
from moe_serve.hf.attend import Attend, additive
from moe_serve.hf.latent_attention import AttendToLatents, LatentProjections
from moe_serve_kernels.cpu import paged_attention as native

NOT_READ = torch.zeros(1, 1, 1, 1)
"""In the place of a mask, which attention modules cut before they hand it on."""


class Choice:
    """What one layer's indexer was asked for a step's tokens; the answer is made when a sequence's pages are known."""

    def __init__(self, indexer: Any, score: Callable[..., torch.Tensor], *asked: Any) -> None:
        """`asked`: hidden [1, T, H], queries' residual [1, T, R], and cosines and sines [1, T, D]."""
        self.most: int = indexer.index_topk
        self._score = score
        self._hidden, self._residual, (self._cos, self._sin) = asked
        self._chosen: dict[int, torch.Tensor] = {}

    def of(self, rows: slice, start: int, keys: KeysInPages) -> torch.Tensor:
        """[count, K] positions that the tokens at `rows` see, the first of which is at position `start`."""
        if rows.start not in self._chosen:
            count = rows.stop - rows.start
            mask = _causal(start, count, self._hidden)[None]
            turns = self._cos[:, rows], self._sin[:, rows]
            asked = self._hidden[:, rows], self._residual[:, rows], turns, mask, None
            with _FirstOfTies():
                self._chosen[rows.start] = self._score(*asked, past_key_values=keys)[0].long()
        return self._chosen[rows.start]


class _FirstOfTies(TorchFunctionMode):
    """While it is entered, `topk` takes the first of equal scores: which one torch takes depends on how many there are
    behind them, and those are of later tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_first_of_ties if func is torch.Tensor.topk else func)(*args, **(kwargs or {}))


def _first_of_ties(scores: torch.Tensor, k: int, dim: int = -1) -> Any:
    """[.., C] -> what `topk` returns; indices [.., K] in rising order."""
    least = scores.topk(k, dim=-1).values[..., -1:]
    better, equal = scores > least, scores == least
    chosen = better | (equal & (equal.cumsum(-1) <= k - better.sum(-1, keepdim=True)))
    indices = chosen.byte().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.return_types.topk((scores.gather(-1, indices), indices))


class KeysInPages:
    """What transformers' indexer asks of a cache: one sequence's keys, the step's own included."""

    def __init__(self, layer: LayerKV, slots: torch.Tensor, pages: torch.Tensor, end: int) -> None:
        self._layer, self._slots, self._pages, self._end = layer, slots, pages, end

    def update_indexer(self, keys: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """keys [1, count, D] of the step's tokens -> [1, C, D] of the context."""
        self._layer.write_index(self._slots, keys[0])
        return self._layer.index_of(self._pages)[None, : self._end]


class AttendToChosen:
    """One layer's attention, as `AttendToLatents`, to the tokens that an indexer chose."""

    def __init__(self, attend: Attend, projections: LatentProjections, choice: Choice, slots: torch.Tensor) -> None:
        """`slots` [T]: where the step's tokens are written."""
        self._attend, self._projections, self._choice, self._slots = attend, projections, choice, slots
        self._to_all = AttendToLatents(attend, projections)

    def decode(self, query: torch.Tensor, layer: LayerKV, group: DecodeGroup) -> torch.Tensor:
        """query [Hq, N, D] -> [N, Hq, Dv]."""
        return torch.cat([self._decode_one(query[:, i : i + 1], layer, one) for i, one in enumerate(group.singly())])

    def _decode_one(self, query: torch.Tensor, layer: LayerKV, one: DecodeGroup) -> torch.Tensor:
        pages = one.page_table[0, : -(-one.max_length // layer.page_size)]
        chosen = self._chosen(slice(one.first_row, one.first_row + 1), one.max_length - 1, layer, pages, one.max_length)
        if one.max_length <= self._choice.most:
            return self._to_all.decode(query, layer, one)
        if native.is_available(layer.keys.device, layer.keys.dtype):
            return self._attend_in_place(query, layer, chosen, pages, one.lengths)
        seen = chosen[0]
        rows = layer.keys[0, pages[seen // layer.page_size] * layer.page_size + seen % layer.page_size]
        return self._attend_to_rows(query, rows)

    def _attend_in_place(
        self, query: torch.Tensor, layer: LayerKV, chosen: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """query [Hq, T, D] of tokens that see `lengths` [T] of a sequence, chosen [T, K] of these -> [T, Hq, Dv]."""
        assert self._attend.scaling is not None
        seen = chosen.sort(dim=1).values  # what is hidden from a token lies behind what is not
        attended = native.paged_attention(
            self._to_all.carried_over(query).transpose(0, 1),
            layer.keys,
            layer.values,
            pages[seen // layer.page_size] * layer.page_size + seen % layer.page_size,
            lengths.clamp(max=chosen.shape[1]),
            page_size=1,
            scale=self._attend.scaling,
        )
        return self._to_all.carried_back(attended)

    def _attend_to_rows(self, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """query [Hq, 1, D], latents and rotary values [K, rank + R] -> [1, Hq, Dv]."""
        heads, plain, rank = self._projections.heads, self._projections.plain, self._projections.rank
        carried = torch.cat([heads.carry_over(query[..., :plain]), query[..., plain:]], dim=-1)
        keys = rows[None, None]
        attended = sdpa(carried.transpose(0, 1)[None], keys, keys[..., :rank], scale=self._attend.scaling)
        return heads.carry_back(attended[0].transpose(0, 1)).transpose(0, 1)

    def prefill(self, query: torch.Tensor, layer: LayerKV, run: PrefillRun) -> torch.Tensor:
        """query [Hq, count, D] -> [count, Hq, Dv]."""
        chosen = self._chosen(slice(run.first_row, run.first_row + run.count), run.start, layer, run.pages, run.end)
        if run.end <= self._choice.most:
            return self._to_all.prefill(query, layer, run)
        if native.is_available(layer.keys.device, layer.keys.dtype):
            lengths = torch.arange(run.start, run.end) + 1
            return self._attend_in_place(query, layer, chosen, run.pages, lengths)
        return AttendToLatents(_Masked(self._attend, chosen), self._projections).prefill(query, layer, run)

    def _chosen(self, rows: slice, start: int, layer: LayerKV, pages: torch.Tensor, end: int) -> torch.Tensor:
        return self._choice.of(rows, start, KeysInPages(layer, self._slots[rows], pages, end))


class _Masked(Attend):
    """Prompts' attention to chosen tokens [count, K]."""

    def __init__(self, attend: Attend, chosen: torch.Tensor) -> None:
        super().__init__(attend.scaling, None, None)
        self._chosen = chosen

    def attend_to_context(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: PrefillRun
    ) -> torch.Tensor:
        hidden = torch.ones(run.count, run.end, dtype=torch.bool, device=query.device).scatter_(1, self._chosen, False)
        mask = additive(hidden, query.dtype) + _causal(run.start, run.count, query)
        return self._attention(query[None], keys[None], values[None], mask)[0].transpose(0, 1)


def _causal(start: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [count, start + count]."""
    key_pos = torch.arange(start + count, device=like.device)[None]
    return additive(key_pos > torch.arange(start, start + count, device=like.device)[:, None], like.dtype)


def install(model: nn.Module, config: Any) -> None:
    """Have every indexer of `model` answer with a Choice; `config` is the family hook's and not needed."""
    for module in model.modules():
        if hasattr(module, "expand_kv") and hasattr(module, "indexer"):
            module.register_forward_pre_hook(_without_mask, with_kwargs=True)
            if module.indexer is not None:
                _defer(module.indexer)


def _without_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": NOT_READ}


def _defer(indexer: Any) -> None:
    score = indexer.forward

    def forward(hidden: torch.Tensor, residual: torch.Tensor, turns: Any, *rest: Any, **kwargs: Any) -> Choice:
        return Choice(indexer, score, hidden, residual, turns)

    indexer.forward = forward
