"""Speculation by prompt lookup beside none: the same requests, sides in turn, in one process.

    python benchmarks/bench_speculation.py                                   # the demo model
    python benchmarks/make_checkpoint.py qwen3-moe-500m /tmp/q500
    python benchmarks/bench_speculation.py /tmp/q500 --cache-frac 0 0.25

Prompts of two kinds: `edit` asks for code that the prompt holds, with a name changed; `prose` repeats nothing. Sides:
`none`; `trial`, which guesses as far as it pays; `always`, which checks every guess. Each round, each side answers the
same requests, in changing order. Ratios are none's time over a side's: of CPU seconds (`cpu`) and of the clock. Tokens
must be equal. `bound`: tokens per step, what a side would gain if a step with drafts took no longer. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import fix_environment, hardware, versions

SIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "trial": {"speculative_method": "ngram"},
    "always": {"speculative_method": "ngram", "speculative_trial": False},
}
CODE = """def read_{0}(path):
    with open(path) as file:
        rows = [line.split() for line in file]
    return [row for row in rows if row]


def total_{0}(rows):
    result = 0
    for row in rows:
        result = result + int(row[0])
    return result

"""
PROSE = (
    "The harbour was quiet before the storm, and nobody on the quay spoke of it.",
    "A letter had come in the morning from a brother who had left long ago.",
    "She walked up the hill, past the mill and the closed school, to the old tower.",
    "Below, small boats turned slowly, each one pointing somewhere else.",
)


def main() -> None:
    args = parse()
    fix_environment(args.threads)
    cells = [cell(args, kind, frac) for frac in args.cache_frac for kind in args.kinds]
    print("\n| prompts | experts in memory | side | over none: CPU, clock | tokens per step | accepted of drafted |")
    print("|---|---|---|---|---|---|")
    for found in cells:
        where = "all" if not found["cache_frac"] else f"{found['cache_frac']:.0%}"
        for name, row in found["sides"].items():
            print(
                f"| {found['prompts']} | {where} | {name} | {row['cpu']:.3f}, {row['clock']:.3f} | {row['bound']:.2f}"
                f" | {row['accepted']} of {row['drafted']} |"
            )
    print(json.dumps({"cells": cells, "hardware": hardware(), "versions": versions(), "args": vars(args)}))


@dataclass
class Side:
    """One engine, what it answered and how long it took."""

    llm: Any
    tokens: list[list[int]] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    clock_s: list[float] = field(default_factory=list)
    steps: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0

    def on_step(self, stats: Any) -> None:
        self.steps += stats.num_generated_tokens > 0
        self.generated += stats.num_generated_tokens
        self.drafted += stats.num_drafted_tokens
        self.accepted += stats.num_accepted_tokens

    def on_load(self, load: Any) -> None:
        """Only steps are of interest."""

    on_finished = on_aborted = on_load

    def answer(self, prompts: list[str], params: Any) -> None:
        self.llm.engine.observer = self
        cpu_s, clock_s = time.process_time(), time.perf_counter()
        results = self.llm.generate(prompts, params)
        self.cpu_s.append(time.process_time() - cpu_s)
        self.clock_s.append(time.perf_counter() - clock_s)
        self.tokens += [list(result.completions[0].token_ids) for result in results]

    def report(self, none: Side, batch: int) -> dict[str, Any]:
        return {
            "cpu": median(a / b for a, b in zip(none.cpu_s, self.cpu_s, strict=True)),
            "clock": median(a / b for a, b in zip(none.clock_s, self.clock_s, strict=True)),
            "cpu_all": sum(none.cpu_s) / sum(self.cpu_s),
            "bound": self.generated / self.steps / batch,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


def cell(args: argparse.Namespace, kind: str, frac: float) -> dict[str, Any]:
    """All sides on one kind of prompts, with all experts in memory (0) or a fraction."""
    from moe_serve import LLM, SamplingParams
    from moe_serve.cli.flags import default_model

    model = args.model or default_model()
    cache = {} if not frac else {"moe_cache_mib": cache_mib(model, frac)}
    common: dict[str, Any] = {
        "num_threads": args.threads,
        "max_model_len": 2048,
        "max_num_seqs": args.batch,
        "enable_prefix_caching": False,
    }
    sides = {name: Side(LLM(model, **common, **cache, **SIDES[name])) for name in dict.fromkeys(["none", *args.sides])}
    params = SamplingParams(temperature=args.temperature, seed=1, max_tokens=args.tokens, ignore_eos=True)
    shuffle = random.Random(0)
    for number in range(args.rounds):
        prompts = [prompt_of(kind, number * args.batch + i) for i in range(args.batch)]
        for name in shuffle.sample(list(sides), len(sides)):
            sides[name].answer(prompts, params)
    assert all(side.tokens == sides["none"].tokens for side in sides.values()), "tokens differ"
    report = {name: side.report(sides["none"], args.batch) for name, side in sides.items()}
    for side in sides.values():
        side.llm.close()
    return {"prompts": kind, "cache_frac": frac, "sides": report}


def prompt_of(kind: str, number: int) -> str:
    if kind == "edit":
        code = CODE.format(f"part{number}") + CODE.format(f"other{number}")
        return f"{code}# The same with longer names:\n{code}# The same again:\n{code[: len(code) // 8]}"
    return " ".join(random.Random(number).sample(PROSE, len(PROSE)))


def cache_mib(model: str, frac: float) -> int:
    from moe_serve.hf.checkpoint import open_all_experts

    store = open_all_experts(model)
    return -(-int(store.num_total * frac) * store.slot_bytes // (1 << 20))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder; default: the demo model")
    parser.add_argument("--cache-frac", type=float, nargs="+", default=[0.0], help="of the experts; 0: all in memory")
    parser.add_argument("--kinds", nargs="+", default=["edit", "prose"], choices=["edit", "prose"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--batch", type=int, default=1, help="requests at once")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
