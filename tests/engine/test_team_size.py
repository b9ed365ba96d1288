"""TeamSize on machines that are simulated: a step's duration for each number of threads, quiet and beside others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_serve
from moe_serve import LLM, SamplingParams
from moe_serve.execution.team_size import LAST_PAUSE, TeamSize
from moe_serve_kernels.cpu import library

DEMO = Path(moe_serve.__file__).parent / "demo" / "model"
Machine = Callable[[int], float]
"""Threads -> milliseconds of a step."""


def quiet(threads: int) -> float:
    return 2.0 + 8.0 / threads


def beside(num_busy: int, cores: int) -> Machine:
    """Busy processes take a core each; more threads than are left wait for one another."""
    return lambda threads: quiet(threads) * (4.0 if threads > cores - num_busy else 1.0)


def run(team: TeamSize, machine: Machine, num_steps: int) -> list[int]:
    """Threads of each step. Two kinds alternate, of which one takes three times as long."""
    sizes = []
    for i in range(num_steps):
        sizes.append(team.next())
        team.took(("decode", i % 2), machine(team.next()) * (1 + 2 * (i % 2)))
    return sizes


def mean_ms(machine: Machine, sizes: list[int]) -> float:
    return sum(machine(size) for size in sizes) / len(sizes)


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_a_quiet_machine_has_all_threads(cores: int) -> None:
    sizes = run(TeamSize(cores), quiet, 2000)
    assert mean_ms(quiet, sizes) < 1.01 * quiet(cores)


@pytest.mark.parametrize("num_quiet", [0, 20, 500], ids=lambda count: f"after {count} quiet steps")
@pytest.mark.parametrize(("cores", "num_busy"), [(2, 1), (16, 1), (16, 4)])
def test_busy_processes_get_their_cores(cores: int, num_busy: int, num_quiet: int) -> None:
    team, machine = TeamSize(cores), beside(num_busy, cores)
    run(team, quiet, num_quiet)
    run(team, machine, 400)
    sizes = run(team, machine, 2000)
    assert mean_ms(machine, sizes) < 1.1 * machine(cores - num_busy)


def test_threads_come_back_when_the_machine_is_quiet_again() -> None:
    team = TeamSize(2)
    run(team, beside(1, 2), 5000)
    assert team.next() == 1
    run(team, quiet, LAST_PAUSE + 10)
    assert run(team, quiet, 50).count(2) >= 47  # but for a trial


def test_one_thread_may_be_best_without_others() -> None:
    sizes = run(TeamSize(2), lambda threads: float(threads), 1000)
    assert sizes.count(2) < 100


@pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
def test_a_step_leaves_torch_its_threads_and_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    used: list[int] = []

    def change(team: TeamSize) -> int:
        used.append(1 + len(used) % 2)
        return used[-1]

    params, prompts = SamplingParams(max_tokens=4, temperature=0), [[5, 6, 7], [8, 9]]
    with LLM(DEMO, num_threads=2, max_model_len=64, num_kv_pages=40) as llm:
        expected = [out.completions[0].token_ids for out in llm.generate(prompts, params)]
        monkeypatch.setattr(TeamSize, "next", change)
        assert [out.completions[0].token_ids for out in llm.generate(prompts, params)] == expected
        assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert set(used) == {1, 2}
