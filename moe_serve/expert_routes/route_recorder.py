"""RouteRecorder: the routing of live traffic, kept in a ring and handed out as a RoutingTrace.

One row per token: experts in every layer, whose token it was and at which position. The newest `num_tokens` rows
stay. A token that is computed again after a preemption is the same token and is not recorded again; one that came
from the prefix cache was not computed and has no row. SGLang's expert distribution recorder, mode per_token, does
the same work but leaves it to the reader to tell requests apart. Knows no torch and no HTTP.

Shape alphabet: R rows kept, L MoE layers, K experts per token, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.batch_plan import BatchPlan, StepResult, StepRoutes
from moe_serve.scheduling.sequence import Sequence
from predictors.predictor import RouterShape
from predictors.trace import RoutingTrace, offsets_of


class RouteObserver(Protocol):
    """Is told where the routers of a step sent its tokens."""

    wants_weights: bool

    def on_routes(self, plan: BatchPlan, result: StepResult) -> None:
        """After a step was booked; `result.routes` is there."""
        ...


class RouteRecorder:
    """A RouteObserver; `trace` gives what it was told."""

    def __init__(self, shape: RouterShape, num_tokens: int, weights: bool = False, token_ids: bool = False) -> None:
        """Memory for `num_tokens` rows is touched only as they fill up. `weights`, `token_ids`: keep these as well."""
        rows = (num_tokens, len(shape.layer_ids), shape.top_k)
        self.shape = shape
        self.wants_weights = weights
        self.num_recorded = 0
        """Rows since the start, those that the ring has dropped included."""
        self._ids = np.empty(rows, np.uint8 if shape.num_experts <= 256 else np.int16)
        self._weights: NDArray[np.float16] | None = np.empty(rows, np.float16) if weights else None
        self._token_ids: NDArray[np.int32] | None = np.empty(num_tokens, np.int32) if token_ids else None
        self._numbers = np.empty(num_tokens, np.int64)
        """[R] whose row it is: sequences are numbered as they are first seen."""
        self._positions = np.empty(num_tokens, np.int32)
        self._number_of: dict[Sequence, int] = {}
        self._next_position: dict[Sequence, int] = {}
        self._names: dict[int, str] = {}
        self._num_numbers = 0
        self._forget_at = 256

    @property
    def num_tokens(self) -> int:
        """Rows that a trace would have now."""
        return min(self.num_recorded, len(self._ids))

    def successor(self) -> RouteRecorder:
        """An empty recorder that goes on where this one stops: no token will be in both."""
        other = RouteRecorder(self.shape, len(self._ids), self.wants_weights, self._token_ids is not None)
        other._number_of, other._next_position = dict(self._number_of), dict(self._next_position)
        other._names, other._num_numbers = {n: self._names[n] for n in self._number_of.values()}, self._num_numbers
        return other

    def on_routes(self, plan: BatchPlan, result: StepResult) -> None:
        """Keep one step's rows; `result.routes` must be there."""
        assert result.routes is not None
        for item, span in zip(plan.scheduled, result.routes.rows, strict=True):
            start = max(item.start, self._next_position.get(item.seq, 0))
            end = item.start + item.num_kept
            if start < end and item.seq not in result.errors:
                self._keep(result.routes, span.start + start - item.start, item.seq, start, end)
                self._next_position[item.seq] = end
        self._forget_finished()

    def _keep(self, routes: StepRoutes, row: int, seq: Sequence, start: int, end: int) -> None:
        """Positions `start` to `end` of a sequence, routes from `row` on; in two parts where the ring ends."""
        size, number = len(self._ids), self._number(seq)
        while start < end:
            place = self.num_recorded % size
            count = min(end - start, size - place)
            into, taken = slice(place, place + count), slice(row, row + count)
            self._ids[into] = routes.ids[taken]
            self._numbers[into] = number
            self._positions[into] = range(start, start + count)
            if self._weights is not None and routes.weights is not None:
                self._weights[into] = routes.weights[taken]
            if self._token_ids is not None:
                self._token_ids[into] = seq.token_ids[start : start + count]
            self.num_recorded += count
            start, row = start + count, row + count

    def _forget_finished(self) -> None:
        """Now and then: drop ended sequences, and names that have no row left in the ring."""
        if len(self._next_position) > self._forget_at:
            for seq in [s for s in self._next_position if s.is_finished]:
                del self._next_position[seq], self._number_of[seq]
            self._forget_at = 2 * len(self._next_position) + 256
        if len(self._names) > 2 * len(self._ids):
            kept = set(self._numbers.tolist())
            self._names = {number: name for number, name in self._names.items() if number in kept}

    def _number(self, seq: Sequence) -> int:
        number = self._number_of.get(seq)
        if number is None:
            number = self._number_of[seq] = self._num_numbers
            self._num_numbers += 1
            self._names[number] = f"{seq.request.request_id}[{seq.index}]"
        return number

    def trace(self, meta: Mapping[str, Any]) -> RoutingTrace:
        """The rows of each sequence together, in the order of their positions; a gap starts a new sequence.

        `meta` gains `requests` and `first_positions`, one entry per sequence. InvalidRequestError without any row.
        """
        if not self.num_tokens:
            raise InvalidRequestError("recording", "nothing was recorded; send requests between start and dump")
        numbers, positions = self._numbers[: self.num_tokens], self._positions[: self.num_tokens]
        order = np.lexsort((positions, numbers))
        numbers, positions = numbers[order], positions[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(numbers) != 0) | (np.diff(positions) != 1)])
        found = {
            "recorder": "moe-serve",
            "requests": [self._names[n] for n in numbers[starts].tolist()],
            "first_positions": positions[starts].tolist(),
        }
        return RoutingTrace(
            ids=self._ids[order],
            weights=None if self._weights is None else self._weights[order].astype(np.float32),
            token_ids=None if self._token_ids is None else self._token_ids[order],
            seq_offsets=offsets_of(np.diff(np.r_[starts, len(order)])),
            layer_ids=np.array(self.shape.layer_ids, dtype=np.int32),
            num_experts=self.shape.num_experts,
            meta={**meta, **found},
            source="recording",
        )
