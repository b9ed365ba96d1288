"""Expert-aware batching through the whole engine, beside first come, first served: bytes and speed, sides in turn.

    python benchmarks/make_checkpoint.py qwen3-moe-500m /tmp/q500
    python benchmarks/bench_batching_live.py /tmp/q500 --running 32 --width 8 --cache-frac 0.25

Each side is an engine of its own with the same requests; every round each runs a few steps, in changing order, and
what was decoded, read and spent is added up. Routers of random weights send similar tokens to similar experts only by
accident, so this is the least that a trained model gains. The side `all-at-once` decodes every running sequence in
each step. Prefix caching is off; prompts are computed before the clock starts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_prefetch import cache_mib
from measuring import fix_environment, hardware, median, versions

SIDES = ("first-come", "expert-aware", "all-at-once")


def main() -> None:
    args = parse()
    fix_environment(args.threads)
    sides = {name: Side(name, args) for name in args.sides}
    order, shuffle = list(sides), random.Random(0)
    for _ in range(args.rounds):
        shuffle.shuffle(order)
        for name in order:
            sides[name].run(args.steps)
    report = {name: side.report() for name, side in sides.items()}
    base = report[args.sides[0]]
    print(
        "| side | distinct experts per layer and step | read per token | tokens/s | median step ms | CPU ms per token |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in report.items():
        print(
            f"| {name} | {row['distinct']:.1f} | {row['mb_per_token']:.2f} MB"
            f" ({row['mb_per_token'] / base['mb_per_token'] - 1:+.1%}) | {row['tokens_per_s']:.2f}"
            f" | {row['median_ms']:.1f} | {row['cpu_ms_per_token']:.2f} |"
        )
    print(json.dumps({"sides": report, "hardware": hardware(), "versions": versions(), "args": str(args)}))


class Side:
    """One engine and its running sequences, which do not end."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        from moe_serve import LLM

        length = args.prompt + args.rounds * args.steps + 8
        self.llm = LLM(
            args.model,
            num_threads=args.threads,
            max_model_len=length,
            max_num_seqs=args.running,
            max_num_batched_seqs=None if name == "all-at-once" else args.width,
            expert_aware_batching="on" if name == "expert-aware" else "off",
            max_skipped_steps=args.max_skipped,
            moe_cache_mib=cache_mib(args.model, args.cache_frac),
            enable_prefix_caching=False,
        )
        self.counters = self.llm.engine.runner.experts.counters  # type: ignore[attr-defined]
        self.num_tokens = self.num_steps = 0
        self.bytes = self.uses = 0
        self.cpu_s = 0.0
        self.steps_s: list[float] = []
        self._start(args, length)

    def _start(self, args: argparse.Namespace, length: int) -> None:
        """All prompts computed: from here on every step only decodes."""
        from moe_serve import SamplingParams
        from moe_serve.scheduling.sequence import Request

        engine, rng = self.llm.engine, random.Random(1)
        params = SamplingParams(temperature=0.8, seed=1, max_tokens=length - args.prompt - 1, ignore_eos=True)
        for i in range(args.running):
            prompt = tuple(rng.randrange(3, engine.spec.vocab_size) for _ in range(args.prompt))
            engine.add_request(Request(f"r{i}", prompt, params))
        while engine.scheduler.waiting or any(s.num_computed < s.num_prompt for s in engine.scheduler.running):
            engine.step()

    def run(self, steps: int) -> None:
        counters = self.counters
        bytes_before, uses_before = int(counters.demand_bytes.sum()), counters.num_hits + counters.num_misses
        cpu_before = time.process_time()
        for _ in range(steps):
            start = time.perf_counter()
            self.num_tokens += len(self.llm.engine.step())
            self.steps_s.append(time.perf_counter() - start)
        self.cpu_s += time.process_time() - cpu_before
        self.bytes += int(counters.demand_bytes.sum()) - bytes_before
        self.uses += counters.num_hits + counters.num_misses - uses_before

    def report(self) -> dict[str, Any]:
        return {
            "distinct": self.uses / len(self.steps_s) / len(self.counters.hits),
            "mb_per_token": self.bytes / self.num_tokens / 1e6,
            "tokens_per_s": self.num_tokens / sum(self.steps_s),
            "median_ms": 1000 * median(self.steps_s),
            "cpu_ms_per_token": 1000 * self.cpu_s / self.num_tokens,
            "tokens": self.num_tokens,
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--max-skipped", type=int, default=16)
    parser.add_argument("--cache-frac", type=float, default=0.25, help="of the experts that fit the cache")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16, help="of one side in a round")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
