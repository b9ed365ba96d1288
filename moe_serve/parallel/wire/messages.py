"""What the front and its ranks say to one another, as msgpack. Knows no torch and no sockets.

msgpack rather than pickle: a message is data, so reading one runs no code. What is read is checked against the types
below; arrays travel as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_origin

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from expert_cache.report import ExpertReport, ExpertTotals
from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.scheduling.batch_plan import StepError
from moe_serve.scheduling.sequence import SamplingParams, TokenLogprob
from placement.cost import Layout

Sampled = tuple[int, TokenLogprob | None]
"""A token, and its log-probability where the request asked for it."""
NO_ROUTES, ROUTE_IDS, ROUTE_IDS_AND_WEIGHTS = 0, 1, 2
"""What the front wants to know of a step's routes."""


class NewSequence(Struct, frozen=True):
    """A sequence that ranks do not know yet. They keep a mirror of it, because sampling needs its parameters and
    tokens."""

    key: int
    """Its number in later messages."""
    request_id: str
    index: int
    """Of the request's samples."""
    num_prompt: int
    """Of `tokens`, how many are the prompt's."""
    tokens: list[int]
    max_total_tokens: int
    home: int
    """The rank where it lives."""
    params: SamplingParams


class Item(Struct, frozen=True, array_like=True):
    """A run of one sequence's tokens to compute; see ScheduledSequence."""

    key: int
    start: int
    count: int
    fresh: list[int]
    """Tokens since the sequence was last told of."""
    pages: list[int]
    """All of its KV pages, in order."""


class Start(Struct, frozen=True, tag=True):
    """The front's first word."""

    engine: EngineConfig
    parallel: ParallelConfig


class Step(Struct, frozen=True, tag=True):
    """Compute a batch plan."""

    routes: int
    """NO_ROUTES, ROUTE_IDS or ROUTE_IDS_AND_WEIGHTS."""
    gone: list[int]
    """Keys of sequences that have finished."""
    new: list[NewSequence]
    items: list[Item]


class Place(Struct, frozen=True, tag=True):
    """From the next step on, run the experts that you have in this layout."""

    layout: Layout


class Resize(Struct, frozen=True, tag=True):
    """Change your memory for experts."""

    mib: int


Order = Step | Place | Resize


class Ask(Struct, frozen=True, tag=True):
    """An order; the answer has the same number."""

    number: int
    order: Order


class Stop(Struct, frozen=True, tag=True):
    """End."""


class Counted(Struct, frozen=True):
    """What a rank has counted since it started."""

    traffic: dict[str, int]
    """See Traffic.totals."""
    layer_bytes: list[int]
    """Sent to other ranks, by MoE layer."""
    experts: ExpertTotals


class RoutePiece(Struct, frozen=True):
    """The routes of n of a step's tokens in all layers."""

    rows: NDArray[np.int32]
    """[n] the tokens' numbers in plan order."""
    ids: NDArray[np.integer[Any]]
    """[n, L, K]"""
    weights: NDArray[np.float16] | None = None
    """[n, L, K], where they are wanted."""


class StepDone(Struct, frozen=True, tag=True):
    """What a rank has to say about a step. Keys are indices of the step's items."""

    sampled: dict[int, Sampled]
    errors: dict[int, StepError]
    routes: RoutePiece | None
    late: tuple[int, ...]
    """Items whose mask did not come in time; see StepResult."""
    counted: Counted


class Placed(Struct, frozen=True, tag=True):
    """The layout is in force here."""


class Resized(Struct, frozen=True, tag=True):
    """The memory for experts is what was asked for, unless it was refused."""

    refused: str | None = None
    """Why."""


Outcome = StepDone | Placed | Resized


class Answer(Struct, frozen=True, tag=True):
    """To the Ask of the same number."""

    number: int
    outcome: Outcome


class Ready(Struct, frozen=True, tag=True):
    """The rank has loaded its model and joined the others."""

    engine: EngineConfig
    """As this rank resolved it."""
    layers: tuple[int, ...]
    """Decoder layers with experts."""
    report: ExpertReport


class Failed(Struct, frozen=True, tag=True):
    """The rank ends because of an error."""

    message: str
    is_users: bool
    """The user's mistake, in words for the user; else a crash."""
    files_changed: bool = False
    """A mapped file of the checkpoint was written to: a new group of ranks would compute with another model."""


class Alive(Struct, frozen=True, tag=True):
    """A sign of life."""

    report: ExpertReport | None = None
    """What the rank's experts have done, if that has changed since the last sign."""


FromFront = Start | Ask | Stop
FromRank = Ready | Failed | Alive | Answer


def encode(message: Struct) -> bytes:
    """Any message as bytes."""
    return msgspec.msgpack.encode(message, enc_hook=_plain)


def read_front(raw: bytes | bytearray) -> FromFront:
    """What the front said. msgspec.MsgspecError names what does not fit."""
    return _FROM_FRONT.decode(raw)


def read_rank(raw: bytes | bytearray) -> FromRank:
    """What a rank said. msgspec.MsgspecError names what does not fit."""
    return _FROM_RANK.decode(raw)


def _plain(value: Any) -> Any:
    """Values that msgspec does not know, in terms of those it knows."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} is part of no message")


def restore(kind: Any, value: Any) -> Any:
    """msgspec's dec_hook: arrays from what `encode` made of them."""
    if get_origin(kind) is not np.ndarray:
        raise NotImplementedError(f"{kind} is part of no message")
    dtype, shape, data = value
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape)


_FROM_FRONT = msgspec.msgpack.Decoder(FromFront, dec_hook=restore)
_FROM_RANK = msgspec.msgpack.Decoder(FromRank, dec_hook=restore)
