"""What the expert cache costs when everything fits: cached engine against the one that uses the mapped file.

    python benchmarks/bench_resident.py MODEL [--threads 1] [--rounds 5] [--batch 1 4 16]

Both engines live in one process and decode the same prompts in turn, so read the ratio. Every expert is in a
slot before anything is measured. Tokens must be the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, median, versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    fix_environment(args.threads)
    import moe_serve

    settings: dict[str, Any] = {"max_model_len": 256, "num_threads": args.threads, "enable_prefix_caching": False}
    mapped = moe_serve.LLM(args.model, moe_cache_mib=0, **settings)
    cached = moe_serve.LLM(args.model, moe_cache_mib=1 << 20, **settings)
    fill(cached)
    rows = [compare(mapped, cached, batch, args) for batch in args.batch]
    print("| batch | mapped, tok/CPU-s | cached, tok/CPU-s | cached / mapped |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['batch']} | {row['mapped']:.1f} | {row['cached']:.1f} | **{row['ratio']:.3f}** |")
    print(json.dumps({"rows": rows, "hardware": hardware(), "versions": versions(), "threads": args.threads}))
    sys.stdout.flush()
    os._exit(0)


def fill(llm: Any) -> None:
    """Bring every expert into its slot."""
    cache = llm.engine.runner.experts.cache
    everything = list(range(cache.store.num_experts))
    for layer in cache.store.layers:
        wanted = cache.acquirer.acquire(layer, everything, [1] * len(everything))
        while wanted.ready or wanted.is_pending:
            for expert in list(wanted.ready):
                cache.acquirer.release(wanted, expert)
            if wanted.is_pending:
                cache.acquirer.wait(wanted)
    assert cache.num_resident == cache.store.num_total


def compare(mapped: Any, cached: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, sides in turn."""
    speeds: dict[str, list[float]] = {"mapped": [], "cached": []}
    for number in range(args.rounds + 1):  # the first warms up
        prompts = [[3 + (31 * i + 7 * j + number) % 500 for j in range(16)] for i in range(batch)]
        sides = [("mapped", mapped), ("cached", cached)]
        outputs = {}
        for name, llm in sides if number % 2 else sides[::-1]:
            outputs[name], speed = decode(llm, prompts, args.new_tokens)
            if number:
                speeds[name].append(speed)
        assert outputs["mapped"] == outputs["cached"], "the tokens differ"
    ratios = [c / m for m, c in zip(speeds["mapped"], speeds["cached"], strict=True)]
    return {"batch": batch, **{n: median(s) for n, s in speeds.items()}, "ratio": median(ratios), "ratios": ratios}


def decode(llm: Any, prompts: list[list[int]], num_tokens: int) -> tuple[list[Any], float]:
    """(token ids, tokens per CPU second of the whole run)."""
    from moe_serve import SamplingParams

    start = time.process_time()
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    seconds = time.process_time() - start
    return [r.completions[0].token_ids for r in results], len(prompts) * num_tokens / seconds


if __name__ == "__main__":
    sys.exit(main())
