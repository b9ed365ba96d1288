"""RankRunner: what a mode does on each rank, one step after the other. Knows plans; knows no sockets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moe_serve.parallel.wire.messages import NO_ROUTES, RoutePiece, Sampled
from moe_serve.scheduling.batch_plan import BatchPlan, StepError


@dataclass(frozen=True, slots=True)
class RankStep:
    """A step as a rank sees it."""

    plan: BatchPlan
    homes: tuple[int, ...]
    """For each item of the plan, the rank where its sequence lives."""
    routes: int = NO_ROUTES
    """What the front wants to know of the routes."""

    def part_of(self, rank: int) -> list[int]:
        """Indices of the items whose home is a rank."""
        return [i for i, home in enumerate(self.homes) if home == rank]


class Outcome(NamedTuple):
    """What a rank has to say about a step."""

    sampled: dict[int, Sampled]
    """By index of the step's items."""
    errors: dict[int, StepError]
    """By index of the step's items."""
    routes: RoutePiece | None
    """Of this rank's tokens, if the front wants them and there are any."""
    late: tuple[int, ...] = ()
    """Indices of items whose mask did not come in time; see StepResult."""


class RankRunner(Protocol):
    """A mode: runs this rank's part of a step."""

    def run(self, step: RankStep) -> Outcome: ...
