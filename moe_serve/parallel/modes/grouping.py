"""Groups of ranks that have every expert among them, so that a sequence's tokens never leave its group.

With `--ep-groups N` the ranks are N groups side by side, and the plan says how each group divides the experts.
Within a group, ranks count from 0. Knows steps; knows no model.
"""

from __future__ import annotations

from moe_serve.parallel.modes.route_pieces import renumbered
from moe_serve.parallel.modes.runner import Outcome, RankRunner, RankStep
from moe_serve.scheduling.batch_plan import BatchPlan


class GroupRunner:
    """Gives a mode the part of each step that its group has to do."""

    def __init__(self, inner: RankRunner, first_rank: int, num_ranks: int) -> None:
        """The group is `num_ranks` ranks from `first_rank` on."""
        self._inner = inner
        self._first_rank = first_rank
        self._num_ranks = num_ranks

    def run(self, step: RankStep) -> Outcome:
        last = self._first_rank + self._num_ranks
        chosen = [i for i, home in enumerate(step.homes) if self._first_rank <= home < last]
        if not chosen:
            return Outcome({}, {}, None)
        plan = BatchPlan(tuple(step.plan.scheduled[i] for i in chosen))
        homes = tuple(step.homes[i] - self._first_rank for i in chosen)
        sampled, errors, piece, late = self._inner.run(RankStep(plan, homes, step.routes))
        return Outcome(
            {chosen[i]: s for i, s in sampled.items()},
            {chosen[i]: error for i, error in errors.items()},
            renumbered(piece, step.plan, chosen),
            tuple(chosen[i] for i in late),
        )
