"""Which mode a rank runs, by --ep-mode and --ep-groups. Knows the modes; knows no sockets.

With `--ep-groups N` the ranks are N groups side by side, and the plan says how each group divides the experts. A
sequence's tokens never leave its group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_serve.config import ParallelConfig
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.parallel.modes.conventional import ConventionalRunner
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.recompute import RecomputingRunner
from moe_serve.parallel.modes.route_pieces import renumbered
from moe_serve.parallel.modes.runner import Outcome, RankRunner, RankStep
from moe_serve.scheduling.batch_plan import BatchPlan

MODES: Mapping[str, Callable[[ModelRunner, ExpertShare], RankRunner]] = {
    "conventional": ConventionalRunner,
    "coherent": RecomputingRunner,
}


def make_runner(rank: int, parallel: ParallelConfig, runner: ModelRunner, share: ExpertShare) -> RankRunner:
    """The mode, within this rank's group of ranks."""
    mode = MODES[parallel.ep_mode](runner, share)
    size = parallel.ranks_per_group
    return mode if parallel.ep_groups == 1 else GroupRunner(mode, parallel.group_of(rank) * size, size)


class GroupRunner:
    """Gives a mode the part of each step that its group has to do. Within the group, ranks count from 0."""

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
