"""Expert e on device e mod G, in every layer."""

from __future__ import annotations

import numpy as np

from placement.cost import Layout
from placement.fill import fill
from placement.problem import PlacementProblem
from placement.run import Run


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """Pinned experts and full devices are stepped around."""
    wish = np.arange(problem.num_experts) % problem.num_devices
    layout = Layout(fill(problem, np.broadcast_to(wish, problem.load.shape)))
    run.offer(layout, "round_robin")
    return layout
