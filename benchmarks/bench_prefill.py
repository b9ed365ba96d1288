"""Prompts through a small expert cache: with streaming and without it, beside what disk and CPU allow.

    python benchmarks/make_checkpoint.py mixtral-4g /tmp/m4g
    python benchmarks/bench_prefill.py /tmp/m4g --cache-frac 0.25 --prompt-lens 32,128,512 --rounds 5

A prompt needs nearly all experts of every layer, so its time is at least the bytes of those that are not resident over
the disk's rate, and at least the time it takes with all experts in memory: the larger of the two is the limit. Every
round runs each prompt length in both ways in turn, in one process, and decodes some tokens after it: what they hit,
and what is still resident, tells whether the prompt swept the cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_offload import sizes
from measuring import fix_environment, hardware, median, versions
from offload_decode import Clock, read_rate

from moe_serve.openmp import spin_briefly


def main() -> int:
    args = parse()
    fix_environment(args.threads)
    del os.environ["OMP_WAIT_POLICY"]
    spin_briefly(os.environ)  # as `moe-serve serve` does
    rows = measure(args)
    print_table(rows)
    print(json.dumps({"hardware": hardware(), "versions": versions(), "rows": rows}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="FOLDER")
    parser.add_argument("--cache-frac", type=float, default=0.25, help="of the experts that fit the cache")
    parser.add_argument("--prompt-lens", default="32,128,512")
    parser.add_argument("--num-tokens", type=int, default=9, help="decoded after each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--expert-file", help="made by `moe-serve pack`")
    parser.add_argument("--skip-resident", action="store_true", help="do not time the model in memory")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per round, prompt length and way."""
    rng = random.Random(0)
    lengths = [int(n) for n in args.prompt_lens.split(",")]
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    llm = open_model(args, cache_mib(args))
    cache = llm.engine.runner.experts.cache
    suits = cache.acquirer.streaming.suits
    ways = {"streaming": suits, "waves": lambda num_wanted: False}
    rows = []
    run(llm, cache, [rng.randrange(vocab) for _ in range(64)], 33)  # fills the cache as decoding does
    for number in range(args.rounds):
        for length in lengths:
            prompt = [rng.randrange(vocab) for _ in range(length)]
            order = list(ways) if number % 2 else list(reversed(ways))
            for way in order:
                cache.acquirer.streaming.suits = ways[way]
                rate = read_rate(cache)
                row = run(llm, cache, prompt, args.num_tokens)
                rows.append({"way": way, "tokens": length, "rate": rate} | row)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    llm.close()
    if not args.skip_resident:
        add_resident_times(args, rows, lengths, vocab)
    return rows


class KeptClock(Clock):
    """Also notes what is resident after the first step."""

    after_prompt: Any = None

    def on_step(self, stats: Any) -> None:
        if self.after_prompt is None:
            self.after_prompt = self._cache.table.slot_of >= 0
        super().on_step(stats)


def run(llm: Any, cache: Any, prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """A prompt and some tokens after it: times, bytes and hits."""
    from moe_serve import SamplingParams

    resident = cache.table.slot_of >= 0
    clock = KeptClock(cache)
    llm.engine.observer = clock
    before, start = cache.counters.totals(), time.perf_counter()
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    at_prompt = clock.totals[0].since(before)
    decoding = clock.totals[-1].since(clock.totals[0])
    return {
        "prompt_s": clock.times[0] - start,
        "resident": int(resident.sum()),
        "kept_frac": float((resident & clock.after_prompt).sum() / max(1, resident.sum())),
        "read_bytes": at_prompt.demand_bytes + at_prompt.prefetch_bytes,
        "missing_bytes": (cache.store.num_total - int(resident.sum())) * cache.store.expert_bytes,
        "stall_s": at_prompt.stall_s,
        "decode_s": clock.times[-1] - clock.times[0],
        "decode_hit_frac": decoding.hits / max(1, decoding.hits + decoding.misses),
    }


def add_resident_times(args: argparse.Namespace, rows: list[dict[str, Any]], lengths: list[int], vocab: int) -> None:
    """The same lengths with every expert in memory: what computing alone takes."""
    from moe_serve import SamplingParams

    llm, rng = open_model(args, 0), random.Random(1)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(args.rounds + 1):  # the first round reads the files
        for length in lengths:
            prompt, start = [rng.randrange(vocab) for _ in range(length)], time.perf_counter()
            llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
            times[length].append(time.perf_counter() - start)
    for row in rows:
        row["compute_s"] = median(times[row["tokens"]][1:])
    llm.close()


def open_model(args: argparse.Namespace, moe_cache_mib: int) -> Any:
    import torch

    import moe_serve

    torch.set_num_threads(args.threads)
    return moe_serve.LLM(
        str(args.model),
        max_model_len=1024,
        max_num_seqs=1,
        num_threads=args.threads,
        enable_prefix_caching=False,
        moe_cache_mib=moe_cache_mib,
        moe_expert_file=args.expert_file,
    )


def cache_mib(args: argparse.Namespace) -> int:
    size = sizes(args.model)
    return -(-int(size["experts"] * args.cache_frac) * (size["expert"] + 8192) // (1 << 20))


def limit_s(row: dict[str, Any]) -> float:
    """No prompt can be faster: the disk's part, or the CPU's."""
    return float(max(row["missing_bytes"] / row["rate"], row.get("compute_s", 0.0)))


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "\n| prompt tokens | way | prompt tokens/s | of the limit | disk alone s | compute alone s | took s | GB read |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for length in sorted({row["tokens"] for row in rows}):
        for way in ("waves", "streaming"):
            own = [row for row in rows if (row["tokens"], row["way"]) == (length, way)]
            took, limit = median([r["prompt_s"] for r in own]), median([limit_s(r) / r["prompt_s"] for r in own])
            disk = median([r["missing_bytes"] / r["rate"] for r in own])
            compute, read = own[0].get("compute_s", float("nan")), median([r["read_bytes"] for r in own])
            print(
                f"| {length} | {way} | {length / took:.1f} | {limit:.3f} | {disk:.2f} | {compute:.2f} | {took:.2f}"
                f" | {read / 1e9:.2f} |"
            )
    for way in ("waves", "streaming"):
        own = [row for row in rows if row["way"] == way]
        kept, hits = (median([row[name] for row in own]) for name in ("kept_frac", "decode_hit_frac"))
        print(f"{way}: of the resident experts {kept:.3f} outlive a prompt; decoding after it hits {hits:.3f}")


if __name__ == "__main__":
    sys.exit(main())
