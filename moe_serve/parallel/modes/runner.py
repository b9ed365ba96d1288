"""RankRunner: what a mode does on each rank, one step after the other. Knows messages; knows no sockets."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from moe_serve.parallel.wire.messages import RankStep, Sampled


class Outcome(NamedTuple):
    """What a rank has to say about a step."""

    sampled: dict[int, Sampled]
    """Tokens by index of the step's items."""
    errors: dict[int, str]
    """By index of the step's items."""
    routes: list[dict[str, Any]]
    """Pieces of the step's routes, if the front wants them."""


class RankRunner(Protocol):
    """A mode: runs this rank's part of a step."""

    def run(self, step: RankStep) -> Outcome: ...
