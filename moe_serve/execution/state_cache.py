"""StateCache: what recurrent layers keep of a sequence, however long it is: a row per sequence and tensor.

Linear attention, state-space models and short convolutions keep a few tensors of fixed size where attention keeps keys
and values per token. Knows shapes and rows; knows no layer's arithmetic, and not who owns a row
(moe_serve/scheduling/seats.py and saved_states.py do).

Shape alphabet: T tokens in the step, N sequences, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moe_serve.execution.forward_batch import ForwardBatch, PrefillRun, StateRun
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
    """The states of all running sequences, those saved for later ones, and the step that reads and writes them."""

    def __init__(self, shapes: StateShapes, num_seats: int, num_saved: int, device: torch.device) -> None:
        """`num_saved`: rows for saved states, behind those of the seats."""
        num_rows = num_seats + num_saved
        self.layers: dict[int, States] = {
            layer: {key: lazy_zeros((num_rows, *s.size), s.dtype, device) for key, s in found.items()}
            for layer, found in shapes.items()
        }
        self.num_bytes = num_rows * bytes_per_sequence(shapes)
        """What the rows take once all have been written."""
        self._num_seats = num_seats
        self._decodes: tuple[StateRun, ...] = ()
        self._prefills: tuple[tuple[StateRun, PrefillRun], ...] = ()

    def saved_rows(self, layer: int) -> list[torch.Tensor]:
        """For each tensor of a layer: a view of the rows of saved states."""
        return [tensor[self._num_seats :] for tensor in self.layers[layer].values()]

    def begin(self, batch: ForwardBatch) -> None:
        """To be called before each step. Sequences that begin in it begin with zeros, or with a saved state."""
        num_decodes = len(batch.state_runs) - len(batch.prefill_runs)
        self._decodes = batch.state_runs[:num_decodes]
        self._prefills = tuple(zip(batch.state_runs[num_decodes:], batch.prefill_runs, strict=True))
        for run in batch.state_runs:
            if run.begins or run.restored is not None:
                self._set(run)

    def _set(self, run: StateRun) -> None:
        for states in self.layers.values():
            for tensor in states.values():
                tensor[run.seat] = 0 if run.restored is None else tensor[self._num_seats + run.restored]

    def run(self, layer: int, mix: Mix, hidden: torch.Tensor) -> torch.Tensor:
        """One layer over the step's tokens, hidden [1, T, H] -> [1, T, H], each sequence on from its own state."""
        states = self.layers[layer]
        out = torch.empty_like(hidden)
        if count := len(self._decodes):
            seats = tuple(run.seat for run in self._decodes)
            out[0, :count] = _decode(mix, hidden[0, :count, None], states, seats)[:, 0]
            for run in self._decodes:
                self._save(states, run)
        for run, tokens in self._prefills:
            rows = slice(tokens.first_row, tokens.first_row + tokens.count)
            out[:, rows] = mix(hidden[:, rows], _row(states, run.seat), run.begins)
            self._save(states, run)
        return out

    def _save(self, states: States, run: StateRun) -> None:
        if run.saved is not None:
            for tensor in states.values():
                tensor[self._num_seats + run.saved] = tensor[run.seat]


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
