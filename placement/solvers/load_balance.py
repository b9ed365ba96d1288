"""Loads only, as DeepSeek's EPLB does it: the heaviest expert first, onto the least loaded place with room.

Hierarchical where there are nodes: first nodes share each layer's load, then the devices of a node.
With `spare_slots` the experts with most load per copy are copied first. It knows nothing of traffic.
"""

from __future__ import annotations

import numpy as np

from placement.cost import Layout
from placement.packing import pack_layer
from placement.problem import PlacementProblem
from placement.run import Run


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """Longest-processing-time packing, then swaps until no swap lowers the busiest device."""
    layers = [pack_layer(problem, layer) for layer in range(problem.num_layers)]
    device_of = np.stack([devices for devices, _ in layers])
    rows = [(layer, expert, device) for layer, (_, copies) in enumerate(layers) for expert, device in copies]
    layout = Layout(device_of, np.array(rows, np.int64).reshape(-1, 3))
    run.offer(layout, "load_balance")
    return layout
