"""The search for a plan beside serving: a process of its own, at low priority, that has a time limit.

    python -m moe_serve.parallel.front.plan_search FOLDER      reads the question there and writes the answer beside it

The front's process schedules and answers HTTP under one lock of the interpreter; a solver in it would hold both up.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_serve.errors import MoEServeError
from moe_serve.planning.replanning import Replanning, Terms, judge, propose
from placement.plan import PlacementPlan
from predictors import trace as traces
from predictors.trace import RoutingTrace

GRACE_S = 30.0
"""Beyond twice the time limit: to start, to read, and for the last step of a solver."""
TRACE, QUESTION, ANSWER = "trace.npz", "question.json", "answer.json"


class PlanSearchError(MoEServeError):
    """The search gave nothing."""


async def search(
    plan: PlacementPlan, trace: RoutingTrace, terms: Terms, candidate: PlacementPlan | None = None
) -> tuple[PlacementPlan, Replanning]:
    """A plan that this traffic would rather have than `plan`, or `candidate`, and what is to be said for it.

    PlanSearchError. Cancelling it ends the process.
    """
    with tempfile.TemporaryDirectory(prefix="moe-serve-plan-") as name:
        folder = Path(name)
        await asyncio.to_thread(_ask, folder, plan, trace, terms, candidate)
        await _run(folder, 2 * terms.time_limit_s + GRACE_S)
        answer = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    return PlacementPlan.from_json(answer["plan"]), Replanning(**answer["verdict"])


def _ask(folder: Path, plan: PlacementPlan, trace: RoutingTrace, terms: Terms, candidate: PlacementPlan | None) -> None:
    trace.save(folder / TRACE)
    question = {
        "plan": plan.to_json(),
        "terms": asdict(terms),
        "candidate": None if candidate is None else candidate.to_json(),
    }
    (folder / QUESTION).write_text(json.dumps(question), encoding="utf-8")


async def _run(folder: Path, timeout_s: float) -> None:
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "moe_serve.parallel.front.plan_search", str(folder))
    process = await asyncio.create_subprocess_exec(*command, env=environ, stderr=asyncio.subprocess.PIPE)
    try:
        _, errors = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        raise PlanSearchError(f"the search for a plan did not end within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise PlanSearchError(f"the search for a plan failed ({' '.join(last)[:200]})")


def answer(folder: Path) -> dict[str, Any]:
    """What is to be written for the question in `folder`."""
    question = json.loads((folder / QUESTION).read_text(encoding="utf-8"))
    trace, terms = traces.load(folder / TRACE), Terms(**question["terms"])
    plan = PlacementPlan.from_json(question["plan"])
    if question["candidate"] is None:
        candidate, verdict = propose(plan, trace, terms)
    else:
        candidate = PlacementPlan.from_json(question["candidate"])
        verdict = judge(plan, candidate, trace, terms)
    return {"plan": candidate.to_json(), "verdict": verdict.to_json()}


def main() -> int:
    os.nice(10)
    folder = Path(sys.argv[1])
    (folder / ANSWER).write_text(json.dumps(answer(folder)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
