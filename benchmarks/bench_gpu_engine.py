"""The engine on this GPU over a random Mixtral: steps captured and launched, all experts in slots or a part of them.

    python benchmarks/bench_gpu_engine.py [--size mixtral-8x7b-4l] [--folder DIR] [--batch 1 8 32] [--json FILE]

The checkpoint is made on the spot. Sides, one after the other, over the same prompts, greedily:

    resident, graphs | resident, launched        all experts in slots
    device, graphs | device, launched | host     a cache of --cache-frac of the experts, managed by the GPU or the host
    transformers                                 all on the GPU, generate() with grouped_mm

For each: tokens/s of the steps that decode the whole batch. For all resident: the fraction of the floor, which is the
time to read the weights a token needs at the rate of a large copy. For caches: misses, bytes/s over the link, and the
rate of one large pinned copy beside it. How many tokens equal those of the first side is told: another way to sum may
choose another token where two are close. The last line is JSON, which --json also writes after every side.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, save_json, versions

SIDES: dict[str, dict[str, Any] | None] = {
    "resident, graphs": {},
    "resident, launched": {"enforce_eager": True},
    "device, graphs": {"moe_cache_manager": "device"},
    "device, launched": {"moe_cache_manager": "device", "enforce_eager": True},
    "host": {"moe_cache_manager": "host"},
    "transformers": None,
}
MIB = 1 << 20


def main() -> int:
    args = parse()
    fix_environment(8)
    import torch

    if not torch.cuda.is_available():
        print("bench_gpu_engine needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    from bench_cached_layer import pinned_bytes_per_s
    from bench_decode import token_bytes
    from bench_kernels import measure_limits
    from make_checkpoint import make_checkpoint

    start = time.perf_counter()
    model = str(make_checkpoint(args.size, args.folder))
    print(f"made {args.size} in {time.perf_counter() - start:.0f} s", flush=True)
    limits, link = measure_limits(), pinned_bytes_per_s()
    floor = limits.bytes_per_s / token_bytes(model)
    rows: list[dict[str, Any]] = []
    report = {"gpu": torch.cuda.get_device_name(), "hardware": hardware(), "versions": versions(), "size": args.size}
    report |= {"floor_tokens_per_s": floor, "pinned_bytes_per_s": link, "cache_frac": args.cache_frac, "rows": rows}
    firsts: dict[int, list[Any]] = {}
    for name in args.sides:
        try:
            rows += run_side(name, model, args, firsts)
        except Exception as error:  # the other sides still have something to tell
            print(f"{name} FAILED: {error!r}", flush=True)
            rows.append({"side": name, "error": repr(error)})
        for row in rows:
            if row["side"] == name and "error" not in row:
                print(describe(row, floor, link), flush=True)
        save_json(args.json, report)
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(report))
    return 1 if any("error" in row for row in rows) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mixtral-8x7b-4l", help="one of make_checkpoint.py's")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/moe-serve-gpu-model"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--cache-frac", type=float, default=0.25)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def run_side(name: str, model: str, args: argparse.Namespace, firsts: dict[int, list[Any]]) -> list[dict[str, Any]]:
    """One row per batch size. `firsts`: the first side's tokens by batch size, filled by it."""
    start = time.perf_counter()
    settings = SIDES[name]
    side = Transformers(model) if settings is None else engine(name, model, args, settings)
    load_s = time.perf_counter() - start
    rows = []
    for batch in args.batch:
        prompts = [[3 + (31 * i + 7 * j) % 4000 for j in range(args.prompt_len)] for i in range(batch)]
        side.run(prompts, 8)  # compiles what this batch size needs
        before = totals(side)
        result = side.run(prompts, args.new_tokens)
        spent = {key: value - before[key] for key, value in totals(side).items()}
        same = [
            sum(map(int.__eq__, a, b))
            for a, b in zip(result.tokens, firsts.setdefault(batch, result.tokens), strict=True)
        ]
        speed = result.clock.decode(batch)
        rows.append(
            {"side": name, "batch": batch, "tokens_per_s": speed.tokens_per_wall_s, "steps": speed.num_steps, **spent}
            | {"load_s": load_s, "equal_frac": sum(same) / (batch * args.new_tokens)}
        )
    side.close()
    return rows


def engine(name: str, model: str, args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """MoEServe on the GPU."""
    from engine_sides import MoEServe

    from moe_serve.hf.checkpoint import open_all_experts

    if not name.startswith("resident"):
        store = open_all_experts(model)
        settings = settings | {"moe_cache_mib": int(store.num_total * store.slot_bytes * args.cache_frac) // MIB + 1}
    longest = args.prompt_len + args.new_tokens + 1
    return MoEServe(model, "bfloat16", 8, longest, max(args.batch), device="cuda", **settings)


class Transformers:
    """transformers' own loop on the GPU, timed per forward pass."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, experts_implementation="grouped_mm", device_map="cuda"
        )
        self._model = loaded.eval()

    def run(self, prompts: list[list[int]], new_tokens: int) -> Any:
        """Greedy; the steps after the first one count."""
        import torch
        from engine_sides import RunResult
        from measuring import StepClock

        clock, ids = StepClock(), torch.tensor(prompts, device="cuda")

        def mark(*_: Any) -> None:
            torch.cuda.synchronize()
            clock.mark(len(prompts))

        hook = self._model.register_forward_hook(mark)
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        done = self._model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)
        hook.remove()
        return RunResult([tuple(row[ids.shape[1] :].tolist()) for row in done], clock)

    def close(self) -> None:
        del self._model


def totals(side: Any) -> dict[str, float]:
    """Counters of a cache; zeros where there is none."""
    if isinstance(side, Transformers):
        return {"hits": 0.0, "misses": 0.0, "link_bytes": 0.0}
    found = side.experts.totals()
    return {"hits": found.hits, "misses": found.misses, "link_bytes": found.demand_bytes}


def describe(row: dict[str, Any], floor: float, link: float) -> str:
    line = f"{row['side']:<19} batch {row['batch']:<3} {row['tokens_per_s']:>8.1f} tokens/s"
    if row["batch"] == 1 and row["side"].startswith(("resident", "transformers")):
        line += f"  {row['tokens_per_s'] / floor:.1%} of the floor"
    if row["misses"]:
        rate = row["link_bytes"] * row["tokens_per_s"] / (row["batch"] * row["steps"])
        line += (
            f"  {row['misses'] / (row['hits'] + row['misses']):.1%} missed, {rate / 1e9:.1f} of {link / 1e9:.1f} GB/s"
        )
    return line + f"  ({row['equal_frac']:.0%} of the tokens as the first side's)"


if __name__ == "__main__":
    sys.exit(main())
