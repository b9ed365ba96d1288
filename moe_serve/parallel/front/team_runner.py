"""TeamRunner: the engine's Runner whose work is done by a team of ranks. Knows plans; knows no tensors."""

from __future__ import annotations

from dataclasses import fields
from functools import reduce

from expert_cache.report import ExpertReport, ExpertTotals
from expert_cache.running.experts import ResizeError
from moe_serve.config import EngineConfig
from moe_serve.parallel.front.prescheduling import Prescheduler
from moe_serve.parallel.front.reports import TeamReports
from moe_serve.parallel.front.step_writer import StepWriter, merge
from moe_serve.parallel.front.team import Team
from moe_serve.parallel.wire.messages import (
    NO_ROUTES,
    ROUTE_IDS,
    ROUTE_IDS_AND_WEIGHTS,
    Place,
    Placed,
    Resize,
    Resized,
    StepDone,
)
from moe_serve.scheduling.batch_plan import BatchPlan, StepResult
from placement.cost import Layout, hosts_of
from predictors.predictor import RouterShape


class TeamExperts:
    """All ranks' experts as one. Knows no tensors: they run on the ranks."""

    def __init__(self, team: Team, reports: TeamReports) -> None:
        self._team = team
        self._reports = reports
        self._last = self._before = ExpertTotals()

    def resize(self, mib: int) -> None:
        """Every rank gets this much. ResizeError."""
        for answer in self._team.ask_all(Resize(mib), Resized):
            if answer.refused is not None:
                raise ResizeError(answer.refused)

    def resident(self) -> None:
        """Each rank has its own, and they change faster than ranks tell."""

    def report(self) -> ExpertReport | None:
        """All ranks' together, of the last second or two."""
        return self._reports.total()

    def close(self) -> None:
        """The team is stopped as a whole."""

    def totals(self) -> ExpertTotals:
        """Sums over ranks, as of their last answers, and over the groups of ranks there have been."""
        now = self._of_group()
        if now.hits < self._last.hits:  # a new group counts from zero
            self._before = _plus(self._before, self._last)
        self._last = now
        return _plus(self._before, now)

    def _of_group(self) -> ExpertTotals:
        return reduce(_plus, (counted.experts for counted in self._team.counted.values()), ExpertTotals())


def _plus(left: ExpertTotals, right: ExpertTotals) -> ExpertTotals:
    return ExpertTotals(*(getattr(left, f.name) + getattr(right, f.name) for f in fields(ExpertTotals)))


class TeamRunner:
    """A plan goes to all ranks; what each of them sampled comes back as one StepResult."""

    def __init__(self, team: Team, config: EngineConfig, prescheduler: Prescheduler, shape: RouterShape) -> None:
        self.team = team
        self.config = config
        self.prescheduler = prescheduler
        self.reports = TeamReports(team.reports)
        self.experts = TeamExperts(team, self.reports)
        self._shape = shape
        self._routes = NO_ROUTES
        self._writer = StepWriter()

    def forget(self) -> None:
        """A new group of ranks knows no sequence."""
        self._writer = StepWriter()

    def place(self, layout: Layout) -> None:
        """Between two steps: every rank runs the experts that it has in `layout`. RankLostError."""
        self.team.ask_all(Place(layout), Placed)
        self.prescheduler.place(hosts_of(layout, self.team.parallel.ranks_per_group))

    def run(self, plan: BatchPlan) -> StepResult:
        """RankLostError if a rank is lost meanwhile; then nothing of the step counts."""
        answers = self.team.ask_all(self._writer.write(plan, self._routes), StepDone)
        return merge(plan, answers, self._shape, self._routes)

    def moe_layer_ids(self) -> tuple[int, ...]:
        return self._shape.layer_ids

    def observe_routes(self, wanted: bool, weights: bool = False) -> None:
        """From the next step on, ranks add routes to their answers, or stop to."""
        self._routes = (ROUTE_IDS_AND_WEIGHTS if weights else ROUTE_IDS) if wanted else NO_ROUTES

    def close(self) -> None:
        self.team.stop()
