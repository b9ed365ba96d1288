"""The walk of a step's tokens through the decoder layers when they may move between ranks.

Every rank calls Hugging Face's model with all tokens of the step, which costs an embedding row each; the first
decoder layer keeps those that begin here, and from then on each layer works on the tokens that are here.
A layer with experts runs in two halves: attention up to the experts where the token was, and from the MoE
block's norm on where it is afterwards, with attention answering zero. Nothing of a family's arithmetic is
written again.

Shape alphabet: T tokens of the whole step, n tokens here, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_serve.errors import UnsupportedModelError
from moe_serve.execution.forward_batch import DecodeGroup, ForwardBatch
from moe_serve.hf.experts import SlottedExperts, find_experts
from moe_serve.parallel.modes.coherent import Meeting, Travellers, settle
from moe_serve.parallel.modes.expert_share import ExpertShare

BLOCK_NORM = "post_attention_layernorm"
"""What every family served here calls the norm before its MoE block."""


@dataclass
class Walk:
    """Where the step's tokens are, as far as this rank knows."""

    batch: ForwardBatch
    rows: torch.Tensor
    """[n] int64 ascending: rows of the batch that are here."""
    is_pinned: torch.Tensor
    """[T] bool: prompt tokens, which never move."""
    keep: torch.Tensor
    """Rows, among those here at the end, whose logits are wanted: filled when the last layer is done."""
    visited: dict[int, torch.Tensor] = field(default_factory=dict)
    """By decoder layer, the rows whose keys and values were computed here."""

    def batch_here(self) -> ForwardBatch:
        """The ForwardBatch of the tokens here."""
        return sub_batch(self.batch, self.rows, self.is_pinned)


class AtExperts(Exception):
    """Ends the first half of a layer: the router has chosen."""

    def __init__(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        super().__init__()
        self.ids = ids
        self.weights = weights


class CoherentLayers:
    """Stands where ExpertLayers stood, for the two halves of a layer."""

    def __init__(self) -> None:
        self.given: torch.Tensor | None = None
        """What the experts gave, for the second half; None in the first."""

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.given is None:
            raise AtExperts(ids, weights)
        return self.given.to(hidden.dtype)


class CoherentModel:
    """A model whose decoder layers move tokens; `walk` is set for each step."""

    def __init__(self, model: nn.Module, shared: ExpertShare, meeting: Meeting) -> None:
        self.walk: Walk | None = None
        self.shared = shared
        self.meeting = meeting
        self.experts = CoherentLayers()
        layers = decoder_layers(model)
        for index, layer in enumerate(layers):
            moving = index in find_experts(model)
            step = _LayerStep(self, layer, index, moving, is_last=index == len(layers) - 1)
            layer.forward = step.forward

    def choosing_rows(self) -> torch.Tensor | None:
        """[n] rows for which a router has just chosen; None in the second half of a layer, which chooses again."""
        return self.walk.rows if self.walk is not None and self.experts.given is None else None


class _LayerStep:
    """Takes the place of one decoder layer's forward."""

    def __init__(self, owner: CoherentModel, layer: Any, index: int, moving: bool, is_last: bool) -> None:
        self._owner = owner
        self._index = index
        self._moving = moving
        self._is_last = is_last
        self._forward: Callable[..., torch.Tensor] = layer.forward
        self._norm = getattr(layer, BLOCK_NORM)
        self._norm.register_forward_pre_hook(self._catch)
        self._caught: torch.Tensor | None = None
        self._attention: Any = layer.self_attn
        self._attend: Callable[..., Any] = self._attention.forward

    def _catch(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._caught = arguments[0]

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        """hidden_states [1, n, H] ([1, T, H] for the first layer) -> [1, n', H] of the tokens here afterwards."""
        walk = self._owner.walk
        assert walk is not None
        if self._index == 0:
            hidden_states = hidden_states[:, walk.rows]
        walk.visited[self._index] = walk.rows
        arguments, settings = self._for_rows(walk, arguments, settings)
        if self._moving:
            hidden_states = self._move(walk, hidden_states, arguments, settings)
        elif len(walk.rows):
            hidden_states = self._forward(hidden_states, *arguments, **settings)
        if self._is_last:
            wanted = torch.isin(walk.rows, walk.batch.sample_rows).nonzero()[:, 0]
            walk.keep.resize_(len(wanted)).copy_(wanted)
        return hidden_states

    def _for_rows(self, walk: Walk, arguments: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What the model computed for all T tokens, for those here."""
        total = walk.batch.num_tokens
        kept = {name: _select(value, walk.rows, total) for name, value in settings.items()}
        if len(walk.rows):
            kept["forward_batch"] = walk.batch_here()
        return _select(arguments, walk.rows, total), kept

    def _move(self, walk: Walk, hidden: torch.Tensor, arguments: Any, settings: dict[str, Any]) -> torch.Tensor:
        home, given = self._owner.meeting.run(
            self._index, self._travellers(walk, hidden, arguments, settings), self._norm
        )
        walk.rows = home.rows
        if not len(home.rows):
            return home.hidden[None]
        self._owner.experts.given = given
        self._attention.forward = _answer_zero
        try:
            return self._forward(home.hidden[None], *arguments, **settings)
        finally:
            self._owner.experts.given = None
            self._attention.forward = self._attend

    def _travellers(self, walk: Walk, hidden: torch.Tensor, arguments: Any, settings: dict[str, Any]) -> Travellers:
        """The first half of the layer, and where each token goes next."""
        shared = self._owner.shared
        if not len(walk.rows):
            none, ids, weights = shared.no_tokens()
            return Travellers(none, ids, ids, weights, walk.rows, walk.rows, walk.rows)
        try:
            self._forward(hidden, *arguments, **settings)
        except AtExperts as chosen:
            ids, weights = chosen.ids, chosen.weights.to(torch.float32)
        assert self._caught is not None
        before = self._caught[0]
        self._caught = None
        ranks = shared.ownership.choose(self._index, ids)
        me = shared.exchange.rank
        homes = torch.where(walk.is_pinned[walk.rows], me, settle(ranks, me, shared.exchange.num_ranks))
        shared.count(self._index, ranks, me)
        return Travellers(before, ids, ranks, weights, walk.rows, homes, torch.full_like(homes, me))


def _answer_zero(hidden_states: torch.Tensor, *arguments: Any, **settings: Any) -> tuple[torch.Tensor, None]:
    """Attention in the second half: the residual already has it."""
    return torch.zeros_like(hidden_states), None


def _select(value: Any, rows: torch.Tensor, total: int) -> Any:
    """Rows of every tensor [x, total, ...] in `value`."""
    if isinstance(value, tuple):
        return tuple(_select(item, rows, total) for item in value)
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == total:
        return value[:, rows]
    return value


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """In order. UnsupportedModelError where they cannot be taken apart at the MoE block's norm."""
    experts = {id(module) for module in find_experts(model).values()}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [list(ml) for ml in lists if any(id(m) in experts for layer in ml for m in layer.modules())]
    layers = max(found, key=lambda ml: sum(isinstance(m, SlottedExperts) for layer in ml for m in layer.modules()))
    if not all(hasattr(layer, BLOCK_NORM) and hasattr(layer, "self_attn") for layer in layers):
        raise UnsupportedModelError(
            f"--ep-mode coherent: {type(model).__name__}'s layers have no {BLOCK_NORM} and self_attn;"
            " use --ep-mode conventional"
        )
    return layers


def sub_batch(batch: ForwardBatch, rows: torch.Tensor, is_pinned: torch.Tensor) -> ForwardBatch:
    """The part of a batch that concerns `rows` [n], ascending; a prompt's rows are all among them or none is.

    Needs a batch whose decoding tokens are one group (GroupLimits without limits).
    """
    decoding = rows[~is_pinned[rows]]
    groups = []
    for group in batch.decode_groups:
        table, lengths = group.page_table[decoding], group.lengths[decoding]
        if len(decoding):
            groups.append(DecodeGroup(0, table, lengths, int(lengths.max()), False, None))
    runs, first = [], len(decoding)
    present = set(rows[len(decoding) :].tolist())
    for run in batch.prefill_runs:
        if run.first_row in present:
            runs.append(type(run)(first, run.start, run.end, run.pages, run.masks))
            first += run.count
    return ForwardBatch(
        batch.input_ids[:, rows],
        batch.positions[:, rows],
        batch.kv_slots[rows],
        tuple(groups),
        tuple(runs),
        batch.sample_rows,
        batch.sample_order,
        batch.page_size,
    )
