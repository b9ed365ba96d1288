"""Real ranks behind an engine: one is killed in the middle, and a plan does not fit. Nothing hangs, nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_serve import LLM
from moe_serve.errors import ConfigError
from moe_serve.parallel.front.engine import ParallelEngine

from .references import Reference
from .serving import GREEDY, SMALL_ENGINE, tokens
from .test_parallel import ROOT, write_plan

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]


@pytest.fixture(autouse=True)
def _ranks_find_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(str(folder), **{**SMALL_ENGINE, "devices": 2, "rank_start_s": 300.0, **settings})


def test_killed_rank_costs_a_pause_and_no_token(checkpoint: Checkpoint, reference: References) -> None:
    ref = reference("mixtral")
    llm = load(checkpoint("mixtral"))
    try:
        engine = llm.engine
        assert isinstance(engine, ParallelEngine)
        assert tokens(llm.generate(ref.prompts, GREEDY)) == ref.outputs
        victim = engine.team.describe()["ranks"][1]["pid"]
        seen: list[str] = []
        killer = Killer(victim, engine, seen)
        killer.start()
        assert tokens(llm.generate(ref.prompts, GREEDY)) == ref.outputs
        killer.join()
        assert seen == ["rank 1 died (exit status -9)"]
        assert engine.team.describe()["generation"] == 2
        assert engine.team.describe()["state"] == "ready"
        engine.check_integrity()
    finally:
        llm.close()


class Killer(threading.Thread):
    """Kills a rank once sequences are half way, and notes what the team says about it."""

    def __init__(self, pid: int, engine: ParallelEngine, seen: list[str]) -> None:
        super().__init__(daemon=True)
        self.pid, self.engine, self.seen = pid, engine, seen

    def run(self) -> None:
        while not any(seq.num_generated > 3 for seq in list(self.engine.scheduler.running)):
            pass
        os.kill(self.pid, signal.SIGKILL)
        while not self.engine.team.trouble:
            pass
        self.seen.append(self.engine.team.trouble)


@pytest.mark.slow
def test_plan_of_another_model_ends_every_rank(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, checkpoint("mixtral_wide"), 0, 0)  # 2 layers of 4 experts
    with pytest.raises(ConfigError, match="num_layers is 2, but this model on --devices 2 has 3"):
        load(checkpoint("mixtral"), expert_plan=plan)
