"""Decode tokens/s at batch 1: moe-serve beside transformers and, where it is given, llama.cpp, in turn.

    python benchmarks/bench_decode.py MODEL --threads 2 [--llama-bench BIN GGUF] [--rounds 5]

MODEL is a bf16 checkpoint, GGUF the same one converted. All sides take bf16 weights; moe-serve and transformers run
in this process and compute in what --dtype says (auto: what moe-serve chooses here, and transformers in bf16),
llama.cpp in its own llama-bench (-p 0 -n N). The median over the rounds counts, and ratios. `floor_frac`: the time to
read the weights that a token needs, at the fastest rate seen in this run, over a token's time. Without a GGUF the
llama.cpp side is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, median, versions

from moe_serve.openmp import spin_briefly

PROMPT = tuple(range(5, 21))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--llama-bench", nargs=2, metavar=("BIN", "GGUF"))
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--modules", action="store_true", help="also moe-serve --enforce-eager")
    args = parser.parse_args()
    fix_environment(args.threads)
    del os.environ["OMP_WAIT_POLICY"]
    spin_briefly(os.environ)  # as `moe-serve serve` does; for transformers too, which gains by it
    import torch
    from engine_sides import HFModel, MoEServe, StaticBatch

    torch.set_num_threads(args.threads)
    sides: dict[str, Any] = {"moe-serve": MoEServe(args.model, "auto", args.threads, 256, 1)}
    if args.modules:
        sides["through modules"] = MoEServe(args.model, "auto", args.threads, 256, 1, enforce_eager=True)
    if not args.no_transformers:
        for dtype in ("bfloat16", "float32"):
            sides[f"transformers {dtype}"] = StaticBatch(HFModel(args.model, dtype))
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    rate = 0.0
    for i in range(args.rounds + 1):
        for name, side in sides.items():
            speed = side.run([PROMPT], args.new_tokens).clock.decode(1).tokens_per_wall_s
            if i:  # the first run touches pages
                speeds[name].append(speed)
        if args.llama_bench and i:
            speeds.setdefault("llama.cpp", []).append(_llama_bench(args.llama_bench, args))
        rate = max(rate, read_rate())
    _report(args, {name: median(all_speeds) for name, all_speeds in speeds.items()}, rate)
    sys.stdout.flush()
    os._exit(0)


def _llama_bench(paths: list[str], args: Any) -> float:
    """Tokens/s of one run. `paths`: the program's and the GGUF file's."""
    binary, gguf = paths
    command = [binary, "-m", gguf, "-p", "0", "-n", str(args.new_tokens), "-r", "1", "-t", str(args.threads)]
    done = subprocess.run([*command, "-o", "json"], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def read_rate() -> float:
    """GB/s of reading memory that no cache holds."""
    import torch

    data = torch.ones(64 << 20)
    best = 0.0
    reads: tuple[Callable[[], Any], ...] = (data.sum, data.max, lambda: torch.dot(data, data))
    for read in reads:
        start = time.perf_counter()
        read()
        best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def token_bytes(model: str) -> int:
    """Bytes of bf16 weights that one token reads: its experts, and all that is no expert but the embedding."""
    from moe_serve.hf.checkpoint import open_all_experts, safetensors_files
    from moe_serve.hf.config_file import read_config
    from moe_serve.spec import ModelSpec

    store, spec = open_all_experts(model), ModelSpec.from_hf(read_config(model))
    total = sum(file.stat().st_size for file in safetensors_files(model))
    dense = total - store.num_total * store.expert_bytes - 2 * spec.vocab_size * spec.hidden_size
    return dense + spec.top_k * len(store.layers) * store.expert_bytes


def _report(args: Any, speeds: dict[str, float], rate: float) -> None:
    floor = rate * 1e9 / token_bytes(args.model)
    ours = speeds["moe-serve"]
    print(f"floor: {floor:.1f} tokens/s ({rate:.1f} GB/s, {token_bytes(args.model) / 1e6:.0f} MB per token)")
    for name, speed in speeds.items():
        print(f"{name:22} {speed:7.2f} tokens/s, {speed / floor:.2f} of the floor; moe-serve / it {ours / speed:.2f}")
    result = {"model": args.model, "threads": args.threads, "tokens_per_s": speeds, "floor_tokens_per_s": floor}
    print(json.dumps({**result, "read_gb_s": rate, "hardware": hardware(), "versions": versions()}))


if __name__ == "__main__":
    sys.exit(main())
