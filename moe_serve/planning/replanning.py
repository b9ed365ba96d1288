"""Replanning: is there a plan that recent traffic would rather have than the one in force?

Half of the traffic's sequences make a candidate, the other half judges it, so that what noise alone would save
counts for nothing. A move between ranks that all read the same checkpoint costs one read of each expert moved, so
a plain margin decides; where moves travel over a link, `moe-serve plan watch` weighs them in bytes. Knows traces
and plans; knows no ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_serve.planning import problems
from placement.cost import TOLERANCE, PlanCost, evaluate, hosts_of
from placement.plan import PlacementPlan
from placement.problem import PlacementProblem
from placement.solve import find_plan
from placement.verdict import Verdict, numbers_of
from predictors.trace import RoutingTrace

MIN_TOKENS = 500
"""Of traffic; fewer say too little about hundreds of transitions between experts."""
EFFORT = 4
"""Starts and rounds of the search."""


@dataclass(frozen=True)
class Terms:
    """What a new plan must be worth, and may cost to find."""

    margin_frac: float
    """Share of the cost in force that must be saved."""
    time_limit_s: float
    seed: int = 0


@dataclass(frozen=True)
class Replanning(Verdict):
    """Whether another plan comes into force, and what it was judged on."""

    tokens: int
    """Of the traffic."""
    moved: int
    """(layer, expert, rank) that the other plan needs and the one in force does not have."""


def lacking(trace: RoutingTrace | None) -> str:
    """Why this traffic is too little to judge by; empty if it is not."""
    tokens, sequences = (0, 0) if trace is None else (trace.num_tokens, trace.num_sequences)
    if tokens >= MIN_TOKENS and sequences >= 2:
        return ""
    return f"recent traffic is {tokens} tokens of {sequences} sequences; at least {MIN_TOKENS} of 2 are needed"


def propose(plan: PlacementPlan, trace: RoutingTrace, terms: Terms) -> tuple[PlacementPlan, Replanning]:
    """A candidate under the settings of the plan in force, judged on traffic that it was not made from."""
    half, other_half = halves(trace)
    problem = problems.problem_of_plan(plan, half)
    # Moving everything must save the margin.
    price = terms.margin_frac * evaluate(problem, plan.layout).total
    candidate = find_candidate(plan, problem, price, terms.seed, terms.time_limit_s)
    candidate = replace(candidate, provenance=problems.provenance(trace))
    return candidate, judge(plan, candidate, other_half, terms)


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """Every other sequence, and the rest."""
    order = list(range(trace.num_sequences))
    return trace.select(order[::2]), trace.select(order[1::2])


def find_candidate(
    plan: PlacementPlan, problem: PlacementProblem, price: float, seed: int, time_limit_s: float
) -> PlacementPlan:
    """A plan for `problem`; among equally good layouts the one nearest to `plan`. `price`: of moving all experts."""
    priced = problem.with_(current=plan.layout.device_of, migration_price=price)
    return find_plan(priced, "auto", seed=seed, effort=EFFORT, time_limit_s=time_limit_s)


def judge(plan: PlacementPlan, candidate: PlacementPlan, trace: RoutingTrace, terms: Terms) -> Replanning:
    """Compare on traffic, under the settings of the plan in force."""
    live = problems.problem_of_plan(plan, trace)
    now, then = evaluate(live, plan.layout), evaluate(live, candidate.layout)
    adopt, why = _decide(now, then, terms.margin_frac)
    before, after = (hosts_of(each.layout, plan.num_devices) for each in (plan, candidate))
    return Replanning(
        adopt=adopt,
        why=why,
        **numbers_of(now, then),
        tokens=trace.num_tokens,
        moved=int((after & ~before).sum()),
    )


def _decide(now: PlanCost, then: PlanCost, margin_frac: float) -> tuple[bool, str]:
    saved = 1 - then.total / now.total if now.total > 0 else 0.0
    if then.violation > now.violation + TOLERANCE:
        return False, "breaks the limit on imbalance more than the plan in force"
    if saved <= 0:
        return False, "saves nothing"
    if saved < margin_frac:
        return False, f"saves {saved:.1%}, less than the margin of {margin_frac:.1%}"
    return True, f"saves {saved:.1%}"
