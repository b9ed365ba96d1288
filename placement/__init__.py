"""Where experts live across devices: arrays in, a plan with its proven bound out.

numpy and a solver only: no torch, and none of the other packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_serve_base.public_names import loader

if TYPE_CHECKING:
    from placement.errors import PlacementError
    from placement.plan import PlacementPlan, load_plan, save_plan
    from placement.problem import PlacementProblem
    from placement.solve import find_plan, find_solver, prove
    from placement.topology import Topology

__all__ = [
    "PlacementError",
    "PlacementPlan",
    "PlacementProblem",
    "Topology",
    "find_plan",
    "find_solver",
    "load_plan",
    "prove",
    "save_plan",
]
HOMES = {
    "PlacementError": "errors:PlacementError",
    "PlacementPlan": "plan:PlacementPlan",
    "PlacementProblem": "problem:PlacementProblem",
    "Topology": "topology:Topology",
    "find_plan": "solve:find_plan",
    "find_solver": "solve:find_solver",
    "load_plan": "plan:load_plan",
    "prove": "solve:prove",
    "save_plan": "plan:save_plan",
}
"""Public name -> the module that defines it, and its name there."""


__getattr__ = loader(__name__, HOMES)
