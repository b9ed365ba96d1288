"""TeamRunner: the engine's Runner whose work is done by a team of ranks. Knows plans; knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from expert_cache.counters import ExpertTotals
from moe_serve.batch_plan import BatchPlan, StepResult
from moe_serve.config import EngineConfig
from moe_serve.errors import InvalidRequestError
from moe_serve.parallel.messages import PlanWriter, merge_results
from moe_serve.parallel.prescheduling import Prescheduler
from moe_serve.parallel.team import Team


class TeamExperts:
    """The ranks' expert caches as one, for statistics."""

    belady_gap_frac = None
    """Each rank has its own, and their mean means nothing."""
    shadow_hits: Mapping[str, int] = {}

    def __init__(self, team: Team) -> None:
        self._team = team
        self._last = self._before = ExpertTotals()
        self.experts = self.counters = self

    def totals(self) -> ExpertTotals:
        """Sums over ranks, as of their last answers, and over the groups of ranks there have been."""
        now = self._of_group()
        if now.hits < self._last.hits:  # a new group counts from zero
            self._before = _plus(self._before, self._last)
        self._last = now
        return _plus(self._before, now)

    def _of_group(self) -> ExpertTotals:
        counted = [answer["experts"] for answer in self._team.counted.values()]
        names = counted[0] if counted else {}
        return ExpertTotals(**{name: sum(each[name] for each in counted) for name in names})


def _plus(left: ExpertTotals, right: ExpertTotals) -> ExpertTotals:
    return ExpertTotals(*(getattr(left, f.name) + getattr(right, f.name) for f in fields(ExpertTotals)))


class TeamRunner:
    """A plan goes to all ranks; what each of them sampled comes back as one StepResult."""

    def __init__(self, team: Team, config: EngineConfig, prescheduler: Prescheduler) -> None:
        self.team = team
        self.config = config
        self.prescheduler = prescheduler
        self.expert_layers = TeamExperts(team)
        self._writer = PlanWriter()

    def forget(self) -> None:
        """A new group of ranks knows no sequence."""
        self._writer = PlanWriter()

    def run(self, plan: BatchPlan) -> StepResult:
        """RankLostError if a rank is lost meanwhile; then nothing of the step counts."""
        starts = {}
        if self.team.parallel.ep_mode == "coherent":
            decoding = [item.seq for item in plan.scheduled if item.count == 1]
            starts = self.prescheduler.starts(decoding)
        answers = self.team.ask_all({"op": "step", **self._writer.write(plan, starts)})
        return merge_results(plan, answers)

    def resize_expert_cache(self, moe_cache_mib: int) -> None:
        """Every rank gets this much. InvalidRequestError."""
        for answer in self.team.ask_all({"op": "resize", "mib": moe_cache_mib}):
            if "refused" in answer:
                raise InvalidRequestError("mib", answer["refused"])

    def moe_layer_ids(self) -> tuple[int, ...]:
        return tuple(self.team.layers)

    def resident_experts(self) -> None:
        """Each rank has its own."""

    def expert_report(self) -> None:
        """Ranks report what they send (`Team.counted`), not yet their experts by layer."""

    def watch_routes(self, wanted: bool, weights: bool = False) -> None:
        if wanted:
            raise InvalidRequestError("", "routes are not recorded over several devices yet; use one device for that")

    def close(self) -> None:
        self.team.stop()
