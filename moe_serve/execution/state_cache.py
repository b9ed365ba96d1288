"""StateCache: what recurrent layers keep of a sequence, however long it is: a row per running sequence and tensor.

Linear attention, state-space models and short convolutions keep a few tensors of fixed size where attention keeps keys
and values per token. Knows shapes and rows; knows no layer's arithmetic, and not who owns a row
(moe_serve/scheduling/seats.py does).

Shape alphabet: T tokens in the step, N sequences, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_serve.execution.forward_batch import ForwardBatch
from moe_serve.execution.kv_cache import lazy_zeros

StateKey = tuple[str, int]
"""Kind ("conv" or "recurrent") and number of one of a layer's tensors."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """One tensor that a layer keeps per sequence."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


StateShapes = Mapping[int, Mapping[StateKey, StateShape]]
"""By decoder layer."""
States = dict[StateKey, torch.Tensor]
"""One layer's tensors, [N, *size] each."""
Mix = Callable[[torch.Tensor, States, bool], torch.Tensor]
"""hidden [N, T, H], the states of N sequences, and whether these begin here -> [N, T, H]; the states are changed in
place. Where sequences begin, the states are zeros."""


def bytes_per_sequence(shapes: StateShapes) -> int:
    """State bytes of one sequence over all layers."""
    return sum(shape.num_bytes for layer in shapes.values() for shape in layer.values())


class StateCache:
    """The states of all running sequences, and the step that reads and writes them."""

    def __init__(self, shapes: StateShapes, num_seats: int, device: torch.device) -> None:
        self.layers: dict[int, States] = {
            layer: {key: lazy_zeros((num_seats, *s.size), s.dtype, device) for key, s in found.items()}
            for layer, found in shapes.items()
        }
        self.num_bytes = num_seats * bytes_per_sequence(shapes)
        """What the rows take once all have been written."""
        self._batch: ForwardBatch | None = None

    def begin(self, batch: ForwardBatch) -> None:
        """To be called before each step. Sequences that begin in it begin with zeros."""
        self._batch = batch
        for seat in batch.fresh_seats:
            for states in self.layers.values():
                for tensor in states.values():
                    tensor[seat] = 0

    def run(self, layer: int, mix: Mix, hidden: torch.Tensor) -> torch.Tensor:
        """One layer over the step's tokens, hidden [1, T, H] -> [1, T, H], each sequence on from its own state."""
        batch, states = self._batch, self.layers[layer]
        assert batch is not None
        seats = batch.seats
        num_decodes = len(seats) - len(batch.prefill_runs)
        out = torch.empty_like(hidden)
        if num_decodes:
            out[0, :num_decodes] = _decode(mix, hidden[0, :num_decodes, None], states, seats[:num_decodes])[:, 0]
        for run, seat in zip(batch.prefill_runs, seats[num_decodes:], strict=True):
            rows = slice(run.first_row, run.first_row + run.count)
            out[:, rows] = mix(hidden[:, rows], _row(states, seat), run.start == 0)
        return out


def _decode(mix: Mix, hidden: torch.Tensor, states: States, seats: tuple[int, ...]) -> torch.Tensor:
    """hidden [N, 1, H]: one token of each of N sequences."""
    if len(seats) == 1:
        return mix(hidden, _row(states, seats[0]), False)
    index = torch.tensor(seats, device=hidden.device)
    gathered = {key: tensor.index_select(0, index) for key, tensor in states.items()}
    out = mix(hidden, gathered, False)
    for key, tensor in states.items():
        tensor.index_copy_(0, index, gathered[key])
    return out


def _row(states: States, seat: int) -> States:
    """Views of one sequence's states: nothing is copied."""
    return {key: tensor[seat : seat + 1] for key, tensor in states.items()}
