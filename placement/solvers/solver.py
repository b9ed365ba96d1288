"""What a solver is: a function from a problem to a layout, which it also offers to the run.

Laws. tests/placement/test_solvers.py checks them on every solver that is installed, and names the law that fails.

1. A layout keeps the problem's `slots`, `spare_slots` and `pinned`, for any number of devices, empty ones included.
2. The same problem, seed and effort give the same layout: draw from `run.rng` only, stop by counts of your own.
3. The best layout goes to `run.offer`, as early as there is one: a Ctrl-C and a time limit keep what was offered.
4. `run.optimal` is set only for a proven optimum, and then `run.optimal_by` names the method.
5. A solver that is not for every problem has a function `applies(problem)` in its module. `solve` raises
   PlacementError with field "solver" where `applies` is false, and nowhere else.
6. The search ends within 5 s of CPU time after `run.out_of_time` is true. A solver that has no answer by then raises
   PlacementError with field "time_limit".

Knows no traces and no command line.
"""

from __future__ import annotations

from typing import Protocol

from placement.cost import Layout
from placement.problem import PlacementProblem
from placement.run import Run


class Solver(Protocol):
    """What a solver's file exports as `solve`."""

    def __call__(self, problem: PlacementProblem, run: Run) -> Layout:
        """The best layout found. PlacementError where the problem is not for this method."""
        ...
