"""Plans as rows of text and as maps of load. Knows no files and prints nothing."""

from __future__ import annotations

from collections.abc import Sequence

from placement.cost import device_load, evaluate
from placement.plan import PlacementPlan
from placement.problem import PlacementProblem
from placement.topology import Floats

HEADER = ("solver", "traffic", "cut %", "node %", "balance", "worst", "MiB/GPU", "seconds", "gap %")
HELD_OUT = ("held-out cut %", "balance")


def table_rows(
    problem: PlacementProblem, plans: Sequence[PlacementPlan], unseen: PlacementProblem | None = None
) -> list[tuple[str, ...]]:
    """The header and one row of text per plan; with `unseen`, another workload's problem, two columns on that."""
    rows: list[tuple[str, ...]] = [(*HEADER, *(HELD_OUT if unseen else ()))]
    for plan in plans:
        rows.append((*_row(problem, plan), *(_unseen(unseen, plan) if unseen else ())))
    return rows


def _row(problem: PlacementProblem, plan: PlacementPlan) -> tuple[str, ...]:
    cost = plan.cost
    mark = "" if cost.feasible else " (over the limit)"
    return (
        plan.solver + mark,
        f"{cost.traffic:.4f}",
        f"{100 * cost.cross_device:.2f}",
        f"{100 * cost.cross_node:.2f}",
        f"{cost.balance_mean:.3f}",
        f"{cost.balance_worst:.3f}",
        f"{most_bytes(problem, plan) / 2**20:.0f}",
        f"{plan.seconds:.1f}",
        f"{100 * plan.gap:.2f}" if cost.feasible else "-",
    )


def most_bytes(problem: PlacementProblem, plan: PlacementPlan) -> int:
    """Bytes of experts on the fullest device."""
    counts = [(plan.layout.device_of == device).sum() for device in range(plan.num_devices)]
    for _, _, device in plan.layout.replicas:
        counts[device] += 1
    return int(max(counts)) * problem.expert_bytes


def busy(problem: PlacementProblem, plan: PlacementPlan) -> Floats:
    """[L, G] load over fair share."""
    return device_load(problem, plan.layout) / problem.topology.fair_share


def _unseen(unseen: PlacementProblem, plan: PlacementPlan) -> tuple[str, str]:
    cost = evaluate(unseen, plan.layout)
    return f"{100 * cost.cross_device:.2f}", f"{cost.balance_mean:.3f}"
