"""LivePlacement: replanning while requests are served.

Keeps the routes of recent traffic, has plans made from them beside serving, and brings one into force between two
steps if it is better by a margin. Knows the engine and plans; knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.errors import MoEServeError
from moe_serve.expert_routes.route_recorder import RouteRecorder
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.parallel.front.plan_search import search
from moe_serve.planning.replanning import Replanning, Terms, lacking
from placement.plan import PlacementPlan
from predictors.trace import RoutingTrace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What came of asking for another plan."""

    adopted: bool
    why: str
    verdict: Replanning | None = None
    """Where traffic was there to judge by."""

    def to_json(self) -> dict[str, Any]:
        facts = {} if self.verdict is None else self.verdict.to_json()
        facts.pop("adopt", None)
        return {**facts, "adopted": self.adopted, "why": self.why}


class LivePlacement:
    """One decision at a time. Its methods run on the event loop; the engine's part between two steps."""

    def __init__(self, serving: AsyncEngine, engine: ParallelEngine) -> None:
        """Before the engine's thread starts: from the first step on, routes are kept."""
        self.counts = {"adopted": 0, "kept": 0, "failed": 0}
        """Decisions so far."""
        self._serving = serving
        self._engine = engine
        self._turn = asyncio.Lock()
        window = engine.team.parallel.expert_plan_window
        self._recorder = RouteRecorder(engine.routing_shape(), window) if window else None
        if self._recorder is not None:
            engine.observe_routes(self._recorder)

    @property
    def plan(self) -> PlacementPlan:
        """In force."""
        return self._engine.plan

    async def adopt(self, plan: PlacementPlan) -> Decision:
        """Bring a plan that fits into force, without judging it. RankLostError: the one before stays."""
        async with self._turn:
            return await self._adopt(plan, "as asked", None)

    async def consider(self, terms: Terms, candidate: PlacementPlan | None = None) -> Decision:
        """Bring `candidate`, or the best plan found for recent traffic, into force if it is worth it.

        PlanSearchError, RankLostError: the plan in force stays.
        """
        async with self._turn:
            try:
                return await self._consider(terms, candidate)
            except MoEServeError:
                self.counts["failed"] += 1
                raise

    async def repeat(self, terms: Terms, interval_s: float) -> None:
        """Consider another plan every so often, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                decision = await self.consider(terms)
            except MoEServeError as error:
                log.warning("no other expert plan: %s", error)
            else:
                log.info("expert plan %s: %s", "replaced" if decision.adopted else "kept", decision.why)

    async def _consider(self, terms: Terms, candidate: PlacementPlan | None) -> Decision:
        trace = await self._recent_traffic()
        why = lacking(trace)
        if trace is None or why:
            self.counts["kept"] += 1
            return Decision(False, why)
        found, verdict = await search(self.plan, trace, terms, candidate)
        if verdict.adopt:
            return await self._adopt(found, verdict.why, verdict)
        self.counts["kept"] += 1
        return Decision(False, verdict.why, verdict)

    async def _recent_traffic(self) -> RoutingTrace | None:
        recorder = self._recorder
        if recorder is None or not recorder.num_tokens:
            return None
        return await self._serving.call(lambda: recorder.trace({}))

    async def _adopt(self, plan: PlacementPlan, why: str, verdict: Replanning | None) -> Decision:
        await self._serving.call(lambda: self._engine.place(plan))
        self.counts["adopted"] += 1
        return Decision(True, why, verdict)
