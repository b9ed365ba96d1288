"""When does a new plan pay for its migration? Judged on a window of live traffic, window by window.

A move pays if the hop bytes it saves until traffic has changed again exceed the bytes of moving. How long
that is, the user says (`horizon_tokens`); what noise alone would "save" is subtracted by judging the new
plan on the half of the window it was not made from.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.cost import evaluate
from placement.migrate import migration_steps, moved_bytes
from placement.plan import PlacementPlan
from placement.problem import PlacementProblem
from placement.verdict import Verdict, numbers_of


@dataclass(frozen=True)
class Migration(Verdict):
    """Whether to move to a candidate plan, in bytes."""

    moved_bytes: int
    saved_bytes: float
    """Hop bytes saved over the horizon; negative if the candidate is worse."""


@dataclass(frozen=True)
class Stakes:
    """What a hop and a move cost."""

    hidden_bytes: int
    """Bytes of one token's hidden state."""
    horizon_tokens: int
    """Tokens until the next decision."""
    choices_per_hop: float
    """Transitions counted per token and layer: 1 for the top-1 path, K for all choices sent separately."""
    migration_weight: float = 1.0
    """Price of a moved byte in hop bytes: below 1 where links idle at times."""


def judge(live: PlacementProblem, in_force: PlacementPlan, candidate: PlacementPlan, stakes: Stakes) -> Migration:
    """Compare on `live`, a problem of traffic the candidate was not made from."""
    now, then = evaluate(live, in_force.layout), evaluate(live, candidate.layout)
    hops = stakes.horizon_tokens * (live.num_layers - 1) * stakes.choices_per_hop
    saved = (now.total - then.total) * hops * stakes.hidden_bytes
    moved = moved_bytes(migration_steps(in_force, candidate), live.expert_bytes)
    over_limit = not now.feasible and then.violation < now.violation
    pays = saved > moved * stakes.migration_weight
    why = "saves more than it moves" if pays else "moves more than it saves"
    if over_limit and not pays:
        why = "the balance limit is broken, and less with the candidate"
    return Migration(adopt=pays or over_limit, why=why, **numbers_of(now, then), moved_bytes=moved, saved_bytes=saved)
