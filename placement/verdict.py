"""Verdict: whether another plan is worth it on traffic that it was not made from. Knows costs; knows no traces.

Who judges adds what its decision rests on: bytes of a move (`drift.py`), or the traffic's size
(moe_serve/planning/replanning.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from placement.cost import PlanCost


@dataclass(frozen=True)
class Verdict:
    """The plan in force and another on the same traffic."""

    adopt: bool
    why: str
    traffic_now: float
    """Mean hop cost per transition of the plan in force. With equal hops: the share of transitions that leave a
    device."""
    traffic_then: float
    """Of the other plan."""
    balance_now: float
    """Mean over layers of the busiest device's load over its fair share, of the plan in force."""
    balance_then: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def numbers_of(now: PlanCost, then: PlanCost) -> dict[str, float]:
    """The numbers of a verdict, by name."""
    return {
        "traffic_now": now.traffic,
        "traffic_then": then.traffic,
        "balance_now": now.balance_mean,
        "balance_then": then.balance_mean,
    }
