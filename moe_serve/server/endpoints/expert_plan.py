"""Another placement of the experts while serving over ranks.

    GET  /expert_plan      the plan in force, as `moe-serve plan --output` writes it
    POST /expert_plan      {"plan": {...}}      brings a plan into force
                           {}, or no body       has one made from recent traffic, and takes it if it is better

Knows FastAPI; LivePlacement (moe_serve/parallel/front/live_placement.py) does the work.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, ClassVar

import numpy as np
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from prometheus_client.core import CounterMetricFamily, Metric
from pydantic import Field

from moe_serve.errors import ConfigError, InvalidRequestError
from moe_serve.parallel import expert_plans as plans
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.parallel.front.live_placement import Decision, LivePlacement
from moe_serve.planning import problems
from moe_serve.planning.replanning import Terms
from moe_serve.server.endpoints import ranks
from moe_serve.server.endpoints.bodies.given import TheService, parsed
from moe_serve.server.endpoints.bodies.parsing import Body
from placement.errors import PlacementError
from placement.plan import PlacementPlan
from predictors.predictor import RouterShape
from predictors.trace import RoutingTrace

router = APIRouter()

DEFAULT_TIME_LIMIT_S = 10.0


class ExpertPlanBody(Body):
    """POST /expert_plan."""

    plan: dict[str, Any] | None = None
    """A plan as `moe-serve plan --output` writes it. Without it one is made from recent traffic."""
    margin_frac: Annotated[float | None, Field(ge=0, lt=1)] = None
    """Share of the recent traffic between ranks that the new plan must save. Default: --expert-plan-margin; a plan that
    is given without it is taken as it is."""
    time_limit_s: Annotated[float, Field(gt=0, le=600)] = DEFAULT_TIME_LIMIT_S
    """For the search."""

    may_be_absent: ClassVar[bool] = True


def add(app: FastAPI, service: TheService) -> None:
    """The routes, and where there are ranks the metrics and what --expert-plan-interval-s asks for."""
    app.include_router(router)
    app.state.placement = None
    if service.ranks is not None:
        app.state.placement = placement = LivePlacement(service.engine, service.ranks)
        service.metrics.registry.register(DecisionCollector(placement))
        _repeat_while_serving(app, service.ranks, placement)


async def _placement_of(http: HttpRequest) -> LivePlacement:
    placement: LivePlacement | None = http.app.state.placement
    if placement is None:
        raise InvalidRequestError("plan", "this server runs on one device; start it with --devices above 1")
    return placement


ThePlacement = Annotated[LivePlacement, Depends(_placement_of)]


@router.get("/expert_plan")
async def show_expert_plan(placement: ThePlacement) -> Response:
    """The plan in force."""
    return Response(json.dumps(placement.plan.to_json()), media_type="application/json")


@router.post("/expert_plan")
async def change_expert_plan(
    body: Annotated[ExpertPlanBody, Depends(parsed(ExpertPlanBody))], placement: ThePlacement, service: TheService
) -> dict[str, Any]:
    """Another plan, given or made from recent traffic; answers when it is in force or was found not worth it."""
    assert service.ranks is not None
    decision = await _change(body, placement, service.ranks)
    return {**decision.to_json(), "placements": service.ranks.num_placements}


async def _change(body: ExpertPlanBody, placement: LivePlacement, engine: ParallelEngine) -> Decision:
    size = engine.team.parallel.ranks_per_group
    candidate = None if body.plan is None else read_plan(body.plan, engine.routing_shape(), size)
    if candidate is not None and body.margin_frac is None:
        return await placement.adopt(candidate)
    default = engine.team.parallel.expert_plan_margin
    margin = default if body.margin_frac is None else body.margin_frac
    return await placement.consider(Terms(margin, body.time_limit_s), candidate)


def read_plan(data: dict[str, Any], shape: RouterShape, num_ranks: int) -> PlacementPlan:
    """A plan from a request. InvalidRequestError names the field that is wrong or does not fit the model."""
    try:
        plan = PlacementPlan.from_json(data)
        plans.check_fit(plan, shape.layer_ids, shape.num_experts, num_ranks)
    except PlacementError as error:
        raise InvalidRequestError(f"plan.{error.field}", f"plan.{error}") from error
    try:  # its settings are those of the next search
        problems.problem_of_plan(plan, _any_trace(shape))
    except (PlacementError, ConfigError, TypeError, ValueError, ArithmeticError) as error:
        raise InvalidRequestError("plan.objective", f"plan.objective: {error}; make the plan again") from error
    return plan


def _any_trace(shape: RouterShape) -> RoutingTrace:
    """One token, to try a plan's settings on."""
    row = np.tile(np.arange(shape.top_k), (1, len(shape.layer_ids), 1))
    return RoutingTrace(row, np.array([0, 1]), np.array(shape.layer_ids), shape.num_experts)


def _repeat_while_serving(app: FastAPI, engine: ParallelEngine, placement: LivePlacement) -> None:
    """A task beside the application, where --expert-plan-interval-s asks for one."""
    parallel, inner = engine.team.parallel, app.router.lifespan_context
    interval_s = parallel.expert_plan_interval_s
    if interval_s is None:
        return

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            terms = Terms(parallel.expert_plan_margin, min(DEFAULT_TIME_LIMIT_S, interval_s))
            task = asyncio.create_task(placement.repeat(terms, interval_s))
            try:
                yield state
            finally:
                task.cancel()
                await asyncio.wait([task])

    app.router.lifespan_context = lifespan


class DecisionCollector:
    """Reads the live placement's counts when Prometheus asks."""

    def __init__(self, placement: LivePlacement) -> None:
        self._placement = placement

    def collect(self) -> Iterator[Metric]:
        name = ranks.PREFIX + "expert_plan_decisions"
        family = CounterMetricFamily(name, "Other placements considered, by outcome.", labels=["outcome"])
        for outcome, count in self._placement.counts.items():
            family.add_metric([outcome], count)
        yield family
