"""What predictors remember of running sequences: one row per stream, grown as larger stream numbers appear.

Knows numpy only.

Shape alphabet: T rows of a call, R rows kept, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from predictors.predictor import Floats, Ints, RouterShape

UNKNOWN = -1
"""In place of an expert that was not observed."""


class Rows:
    """An array whose rows belong to streams; new and forgotten rows hold `empty`."""

    def __init__(self, row_shape: tuple[int, ...], dtype: npt.DTypeLike, empty: float = 0) -> None:
        self._empty = empty
        self.data: npt.NDArray[Any] = np.full((0, *row_shape), empty, dtype=dtype)

    def reset(self, streams: Ints) -> None:
        """Forget these rows, making room for them where there is none."""
        missing = int(streams.max(initial=-1)) + 1 - len(self.data)
        if missing > 0:
            room = max(missing, len(self.data))
            more = np.full((room, *self.data.shape[1:]), self._empty, dtype=self.data.dtype)
            self.data = np.concatenate([self.data, more])
        self.data[streams] = self._empty


class Routes:
    """The current and the previous token's experts of each stream."""

    def __init__(self, shape: RouterShape) -> None:
        row = (shape.num_layers, shape.top_k)
        self._current = Rows(row, np.int32, UNKNOWN)
        self._previous = Rows(row, np.int32, UNKNOWN)
        self._newest = Rows((), np.int32, UNKNOWN)

    @property
    def current(self) -> npt.NDArray[np.int32]:
        """[R, L, K]; UNKNOWN where not observed yet."""
        return self._current.data

    @property
    def previous(self) -> npt.NDArray[np.int32]:
        """[R, L, K]; UNKNOWN for a sequence's first token."""
        return self._previous.data

    @property
    def newest(self) -> npt.NDArray[np.int32]:
        """[R]: the newest layer observed of the current token; UNKNOWN before the first."""
        return self._newest.data

    def begin(self, streams: Ints) -> None:
        for rows in (self._current, self._previous, self._newest):
            rows.reset(streams)

    def step(self, streams: Ints) -> None:
        self.previous[streams] = self.current[streams]
        self.current[streams] = UNKNOWN
        self.newest[streams] = UNKNOWN

    def observe(self, layer: int, streams: Ints, ids: Ints) -> None:
        self.current[streams, layer] = ids
        self.newest[streams] = layer


class ByPosition:
    """Base of predictors for which only a stream's token counts, not what was routed."""

    def __init__(self) -> None:
        self._position = Rows((), np.int64, -1)
        """[R]: the number of each stream's current token."""

    def begin(self, streams: Ints) -> None:
        """See Predictor."""
        self._position.reset(streams)

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        """See Predictor."""
        self._position.data[streams] += 1

    def observe(
        self, layer: int, streams: Ints, ids: Ints, weights: Floats | None = None, hidden: Any | None = None
    ) -> None:
        """See Predictor."""


def multi_hot(ids: Ints, num_experts: int) -> npt.NDArray[np.float32]:
    """[..., K] ids, UNKNOWN allowed -> [..., E] of 0 and 1."""
    rows = ids.reshape(-1, ids.shape[-1])
    hot = np.zeros((len(rows), num_experts + 1), dtype=np.float32)
    hot[np.arange(len(rows))[:, None], rows] = 1  # UNKNOWN is -1: the last column
    return hot[:, :num_experts].reshape(*ids.shape[:-1], num_experts)
