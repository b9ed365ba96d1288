"""What a search carries besides the problem: its seed, its time, its best layout so far.

Deterministic: a solver draws only from `rng` and stops by counts of its own; the time limit only cuts it
short, which the plan then says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from placement.cost import Layout, PlanCost, evaluate
from placement.problem import PlacementProblem

Progress = Callable[[str, PlanCost], None]
"""Called with what is being done and the best cost so far."""


def silent(what: str, cost: PlanCost) -> None:
    """No progress shown."""


@dataclass
class Run:
    """One search. `offer` every layout worth keeping: the best survives a Ctrl-C."""

    problem: PlacementProblem
    seed: int = 0
    time_limit_s: float = np.inf
    effort: int = 20
    """How hard to try, in solver's units (starts, rounds); the same effort and seed give the same plan."""
    progress: Progress = silent
    best: Layout | None = None
    best_cost: PlanCost | None = None
    optimal: bool = False
    """Set by a solver that proved `best` optimal."""
    optimal_by: str = ""
    """The method that proved it."""
    cut_short: bool = False
    """The time limit or a Ctrl-C ended the search."""
    _start: float = field(default_factory=time.monotonic)

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator with this run's seed."""
        return np.random.default_rng(self.seed)

    @property
    def left_s(self) -> float:
        return self._start + self.time_limit_s - time.monotonic()

    @property
    def out_of_time(self) -> bool:
        """Whether to stop; remembers that the answer was yes."""
        self.cut_short = self.cut_short or self.left_s <= 0
        return self.cut_short

    def offer(self, layout: Layout, what: str) -> bool:
        """Keep the layout if it is the best so far."""
        cost = evaluate(self.problem, layout)
        if self.best_cost is not None and cost.rank >= self.best_cost.rank:
            return False
        self.best, self.best_cost = layout, cost
        self.progress(what, cost)
        return True
