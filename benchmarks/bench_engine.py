"""Decode speed of moe-serve against transformers' two ways, interleaved in one process.

    python benchmarks/bench_engine.py [--model FOLDER] [--dtype bfloat16] [--threads 2] [--quick]

Contenders: moe-serve's engine, `model.generate` on a static batch (with its default experts
implementation, and with the fastest of eager, grouped_mm and batched_mm for the cell at hand), and
transformers' continuous batching (with the fastest). Same weights, dtype, threads and prompts;
rounds run A, B, C, A, B, C, ... and every round has prompts of its own, so that no prefix cache
helps. The figure is tokens per second of CPU time (process_time) over the steps in which all
sequences decode and nothing else happens; see measuring.StepClock. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from measuring import Decode, fix_environment, hardware, median, versions

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
CELLS = ((1, 64), (4, 64), (16, 64), (64, 64), (16, 512), (32, 512))
QUICK_CELLS = ((1, 16), (4, 32))
OURS = "moe_serve"


@dataclass
class Cell:
    """All rounds of one number of sequences and prompt length."""

    num_seqs: int
    prompt_len: int
    best_experts: str
    experts_step_ms: dict[str, float]
    speeds: dict[str, list[Decode]] = field(default_factory=dict)
    same_tokens: dict[str, int] = field(default_factory=dict)
    """Sequences, over all rounds, with exactly our tokens."""

    @property
    def name(self) -> str:
        return f"{self.num_seqs}x{self.prompt_len}"

    def median(self, side: str, kind: str = "tokens_per_cpu_s") -> float:
        return median([getattr(d, kind) for d in self.speeds[side]])

    def ratios(self, side: str) -> list[float]:
        """Ours over theirs, round by round: neighbours in time, so that a slow phase hits both."""
        pairs = zip(self.speeds[OURS], self.speeds[side], strict=True)
        return [a.tokens_per_cpu_s / b.tokens_per_cpu_s for a, b in pairs]

    def as_json(self) -> dict[str, Any]:
        others = [s for s in self.speeds if s != OURS]
        return {
            "cell": self.name,
            "best_experts": self.best_experts,
            "experts_step_ms": {k: round(v, 3) for k, v in self.experts_step_ms.items()},
            "speeds": {side: [asdict(d) for d in runs] for side, runs in self.speeds.items()},
            "median_ratio": {s: round(median(self.ratios(s)), 3) for s in others},
            "best_ratio": {s: round(max(self.ratios(s)), 3) for s in others},
            "same_tokens": self.same_tokens,
        }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder; default: the demo model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", nargs="+", metavar="SEQSxPROMPT", help="default: the six of the docstring's table")
    parser.add_argument("--text", type=Path, help="prompts are windows of this text file; default: random tokens")
    experts = ("grouped_mm", "eager", "batched_mm")
    parser.add_argument(
        "--experts",
        nargs="+",
        choices=experts,
        default=experts,
        help="transformers' implementations to try, its default first; batched_mm copies weights per token and can"
        " take minutes per step on large models",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two tiny cells, one round: does it run at all?")
    args = parser.parse_args()
    args.cells = [tuple(map(int, c.split("x"))) for c in args.cells] if args.cells else list(CELLS)
    if args.quick:
        args.cells, args.rounds, args.new_tokens = list(QUICK_CELLS), 1, 12
    return args


class Side(Protocol):
    """A contender of engine_sides.py, which is imported after the environment is set."""

    def run(self, prompts: list[list[int]], new_tokens: int) -> Any: ...


class Bench:
    """The loaded contenders and the rounds over them."""

    def __init__(self, args: argparse.Namespace) -> None:
        import engine_sides as sides
        from bench_prompts import PromptSource

        self.args = args
        max_seqs = max(c[0] for c in args.cells)
        max_len = max(c[1] for c in args.cells) + args.new_tokens
        self.prompts = PromptSource(args.model, args.text, args.seed)
        self.ours = sides.MoEServe(args.model, args.dtype, args.threads, max_len, max_seqs)
        self.hf = sides.HFModel(args.model, args.dtype)
        self.generate = sides.StaticBatch(self.hf)
        self.continuous = sides.ContinuousBatch(self.hf, max_len, max_seqs)
        self.default_experts = sides.EXPERT_IMPLEMENTATIONS[0]

    def run_cell(self, num_seqs: int, prompt_len: int) -> Cell:
        """Choose transformers' fastest experts for this cell, then run the rounds."""
        best, step_ms = self.hf.best_experts(self.prompts.draw(num_seqs, prompt_len), self.args.experts)
        cell = Cell(num_seqs, prompt_len, best, step_ms)
        self.ours.run(self.prompts.draw(num_seqs, prompt_len), 2)  # builds kernels for these shapes
        self.continuous.run(self.prompts.draw(num_seqs, prompt_len), 2)
        for _ in range(self.args.rounds):
            self._round(cell)
        return cell

    def _round(self, cell: Cell) -> None:
        prompts = self.prompts.draw(cell.num_seqs, cell.prompt_len)
        contenders: list[tuple[str, Side, str]] = [
            (OURS, self.ours, self.default_experts),
            ("generate", self.generate, self.default_experts),
        ]
        if cell.best_experts != self.default_experts:
            contenders.append(("generate_best", self.generate, cell.best_experts))
        contenders.append(("continuous", self.continuous, cell.best_experts))
        tokens = {}
        for name, side, experts in contenders:
            self.hf.decode_experts = (experts,)
            result = side.run(prompts, self.args.new_tokens)
            cell.speeds.setdefault(name, []).append(result.clock.decode(cell.num_seqs))
            tokens[name] = result.tokens
        for name in tokens:
            same = sum(a == b for a, b in zip(tokens[OURS], tokens[name], strict=True))
            cell.same_tokens[name] = cell.same_tokens.get(name, 0) + same

    def close(self) -> None:
        self.continuous.close()


def print_table(cells: list[Cell], rounds: int) -> None:
    print("\ndecode tokens per CPU-second, median of rounds (tokens per wall-clock second in brackets)")
    print(
        f"{'cell':>8} {'side':14} {'tok/cpu-s':>10} {'(wall)':>10} {'ours / it: median':>18} {'best':>6}  same tokens"
    )
    for cell in cells:
        for side in cell.speeds:
            wall = f"({cell.median(side, 'tokens_per_wall_s'):.0f})"
            row = f"{cell.name:>8} {side:14} {cell.median(side):10.0f} {wall:>10}"
            ratios = cell.ratios(side)
            agree = f"{cell.same_tokens[side]}/{cell.num_seqs * rounds}"
            print(f"{row} {median(ratios):18.2f} {max(ratios):6.2f}  {'' if side == OURS else agree}")
        print(f"{'':8} fastest experts of transformers: {cell.best_experts} (ms CPU per step: {_ms(cell)})")


def _ms(cell: Cell) -> str:
    return ", ".join(f"{name} {ms:.2f}" for name, ms in cell.experts_step_ms.items())


def summary(args: argparse.Namespace, cells: list[Cell]) -> dict[str, Any]:
    """The JSON line. `passed`: no side is faster than ours in any cell, by the median of rounds."""
    worst = min(median(c.ratios(s)) for c in cells for s in c.speeds if s != OURS)
    return {
        "benchmark": "engine",
        "passed": worst >= 1.0,
        "worst_median_ratio": round(worst, 3),
        "model": args.model,
        "dtype": args.dtype,
        "threads": args.threads,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "cells": [c.as_json() for c in cells],
        "versions": versions(),
        "hardware": hardware(),
    }


def main() -> int:
    args = parse_args()
    fix_environment(args.threads)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cells = []
    with closing(Bench(args)) as bench:  # the manager's thread would keep a failed run alive
        for num_seqs, prompt_len in args.cells:
            cells.append(bench.run_cell(num_seqs, prompt_len))
            print(cells[-1].name, cells[-1].as_json()["median_ratio"], file=sys.stderr, flush=True)
    print_table(cells, args.rounds)
    print(json.dumps(summary(args, cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
