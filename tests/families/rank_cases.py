"""One case of serving, the same on one device and over ranks: what it gives, and what was counted on the way.

A case is JSON: `prompts`, `params` (fields of SamplingParams), `places` ({step: plan file}), `routes` (bool).
"""

from __future__ import annotations

from typing import Any

import msgspec

from moe_serve.engine.engine import Engine
from moe_serve.expert_routes.route_recorder import RouteRecorder
from moe_serve.parallel.expert_plans import read_plan
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.scheduling.sequence import Request, SamplingParams
from placement.cost import hosts_of


def serve(engine: Engine, case: dict[str, Any]) -> dict[str, Any]:
    """Complete the case's prompts together: tokens, log-probabilities and routes, by prompt."""
    recorder = RouteRecorder(engine.routing_shape(), 4096) if case.get("routes") else None
    if recorder is not None:
        engine.observe_routes(recorder)
    params = msgspec.convert(case["params"], SamplingParams, strict=False)
    for i, prompt in enumerate(case["prompts"]):
        engine.add_request(Request(str(i), tuple(prompt), params))
    tokens: list[list[int]] = [[] for _ in case["prompts"]]
    logprobs: list[list[float]] = [[] for _ in case["prompts"]]
    errors: dict[str, str] = {}
    step = 0
    while engine.has_work():
        change_place(engine, case.get("places", {}).get(str(step)))
        for output in engine.step():
            if output.error is not None:
                errors[output.request_id] = output.error.message
            tokens[int(output.request_id)] += output.token_ids
            logprobs[int(output.request_id)] += [found.logprob for found in output.logprobs]
        step += 1
    engine.check_integrity()
    result: dict[str, Any] = {"tokens": tokens, "logprobs": logprobs, "errors": errors, "steps": step}
    if recorder is not None:
        result["routes"] = by_request(recorder)
    return result


def change_place(engine: Engine, plan: str | None) -> None:
    if plan is None:
        return
    assert isinstance(engine, ParallelEngine)
    shape = engine.routing_shape()
    engine.place(read_plan(plan, shape.layer_ids, shape.num_experts, engine.team.parallel.ranks_per_group))


def by_request(recorder: RouteRecorder) -> dict[str, Any]:
    """Each request's routes in the order of its positions; choices sorted, since equal weights have no order."""
    trace = recorder.trace({})
    slices = trace.sequence_slices()
    return {
        name: [sorted_choices(token) for token in trace.ids[rows].tolist()]
        for name, rows in zip(trace.meta["requests"], slices, strict=True)
    }


def sorted_choices(token: list[list[int]]) -> list[list[int]]:
    return [sorted(choices) for choices in token]


def report(engine: ParallelEngine) -> dict[str, Any]:
    """All ranks' expert reports: the tokens they add up to, and experts that are where they should not be."""
    total = engine.expert_report()
    assert total is not None
    hosts = hosts_of(engine.plan.layout, engine.team.num_ranks)
    strays = [
        int((each.residency.ready & ~hosts[:, :, rank]).sum()) for rank, each in engine.expert_reports.by_rank().items()
    ]
    resident = [int(each.residency.ready.sum()) for each in engine.expert_reports.by_rank().values()]
    return {"expert_tokens": total.tokens.tolist(), "strays": strays, "resident": resident}
