"""Place experts on GPUs so that tokens travel little, from recorded routes.

moe-serve trace --prompts prompts.txt -o trace.npz      # first record some
.venv/bin/python examples/planner.py trace.npz [GPUS]
"""

import sys
from pathlib import Path

from placement import PlacementProblem, Topology, find_plan, load_plan, save_plan
from predictors import load_trace


def main() -> None:
    trace = load_trace(sys.argv[1])
    gpus = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    problem = PlacementProblem.from_routes(trace.ids, trace.num_experts, Topology.even(gpus), max_imbalance=1.2)
    for solver in ("contiguous", "auto"):
        plan = find_plan(problem, solver, time_limit_s=5)
        print(f"{solver:12} {plan.cost.total:.3f} hops a step; no plan is more than {plan.gap:.0%} better")
    save_plan(plan, Path("plan.json"))
    homes = load_plan(Path("plan.json")).layout.device_of[0]
    print(f"layer 0: experts 0 to {trace.num_experts - 1} are on GPUs {homes.tolist()}")


if __name__ == "__main__":
    main()
