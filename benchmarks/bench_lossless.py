"""Decode tokens/s at batch 1: experts in plain bf16 beside experts in 12-bit codes, in turn, both resident.

    python benchmarks/make_checkpoint.py qwen3-1b /tmp/qwen3-1b --dtype bfloat16
    python benchmarks/bench_lossless.py /tmp/qwen3-1b --threads 1 [--dtype float32] [--rounds 9]

The codes are packed beside MODEL, into MODEL.codes, unless they are there. Both sides are engines in this process, so
MODEL has to fit twice. Each round decodes the same tokens with one side and then the other; the medians of the speeds
and of the rounds' ratios count.
`experts_*`: the same of the experts' kernel alone, one token at a time through all layers, routes drawn at random. The
run fails where the two sides' tokens differ. With one thread speed is per second of CPU time, which a busy machine
disturbs less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, median, versions

PROMPT = tuple(range(5, 21))
SIDES = ("plain", "lossless")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    fix_environment(args.threads)
    import torch
    from engine_sides import MoEServe

    torch.set_num_threads(args.threads)
    codes = args.model.with_name(args.model.name + ".codes")
    sizes = _pack(args.model, codes)
    files = (None, str(codes))
    engines = [MoEServe(str(args.model), args.dtype, args.threads, 256, 1, moe_expert_file=file) for file in files]
    whole = _in_turn([partial(_decode, engine, args) for engine in engines], args.rounds)
    alone = _in_turn([_experts_alone(engine.experts, args.threads) for engine in engines], args.rounds)
    _report(args, {"tokens_per_s": whole, "experts_gb_s": alone}, sizes)
    return 0


def _pack(model: Path, codes: Path) -> tuple[int, int]:
    """Bytes of all experts, plain and in codes."""
    from expert_cache.storage import expert_file
    from moe_serve.cli import main as moe_serve
    from moe_serve.hf.checkpoint import open_all_experts

    if not codes.exists():
        assert moe_serve(["pack", str(model), str(codes), "--lossless"]) == 0
    return open_all_experts(str(model)).total_bytes, expert_file.read(codes)[0].total_bytes


def _in_turn(sides: list[Callable[[], tuple[float, Any]]], rounds: int) -> list[list[float]]:
    """Each side's speeds over the rounds; a side is (speed, what must be the same on both)."""
    speeds: list[list[float]] = [[] for _ in sides]
    for i in range(rounds + 1):
        results = [side() for side in sides]
        assert results[0][1] == results[1][1], "the two sides' results differ"
        if i:  # the first run touches pages
            for known, (speed, _) in zip(speeds, results, strict=True):
                known.append(speed)
    return speeds


def _decode(engine: Any, args: Any) -> tuple[float, Any]:
    """Tokens per second, and the tokens."""
    result = engine.run([PROMPT], args.new_tokens)
    speed = result.clock.decode(1)
    return speed.tokens_per_cpu_s if args.threads == 1 else speed.tokens_per_wall_s, result.tokens


def _experts_alone(experts: Any, threads: int) -> Callable[[], tuple[float, Any]]:
    """GB/s of bf16 weights that the kernel gets through, and the sum of what it computed."""
    import torch

    from expert_cache.storage.store import matrices_of
    from moe_serve_kernels.cpu.expert_layer import ExpertLayer

    store, keys = (
        experts.store,
        [(layer, e) for layer in experts.store.layers for e in range(experts.store.num_experts)],
    )
    prepared = {key: experts.compute.prepare(store.weights(*key)) for key in keys}
    layers = [ExpertLayer([prepared[layer, e] for e in range(store.num_experts)]) for layer in store.layers]
    rows = matrices_of(store.weights(*keys[0]))
    x = torch.randn(1, rows[0].shape[1], generator=torch.Generator().manual_seed(1))
    top_k = min(8, store.num_experts)
    num_bytes = 2 * sum(m.shape[0] * m.shape[1] for m in rows) * top_k * len(layers)
    weights, clock = torch.ones(1, top_k), time.process_time if threads == 1 else time.perf_counter

    def run() -> tuple[float, Any]:
        choose, total, passes = random.Random(3), 0.0, 4
        routes = [[choose.sample(range(store.num_experts), top_k) for _ in layers] for _ in range(passes)]
        start = clock()
        for route in routes:
            for layer, ids in zip(layers, route, strict=True):
                out, _ = layer.run(x, torch.tensor([ids]), weights, experts.compute.activation)
                total += float(out[0, 0])
        return passes * num_bytes / (clock() - start) / 1e9, total

    return run


def _report(args: Any, measured: dict[str, list[list[float]]], sizes: tuple[int, int]) -> None:
    share = sizes[1] / sizes[0]
    print(f"experts: {sizes[0] / 1e9:.2f} GB, in codes {share:.4f} of that")
    result: dict[str, Any] = {
        "model": str(args.model),
        "threads": args.threads,
        "dtype": args.dtype,
        "size_frac": share,
    }
    for name, speeds in measured.items():
        ratios = [coded / plain for plain, coded in zip(*speeds, strict=True)]
        medians = dict(zip(SIDES, map(median, speeds), strict=True))
        print(
            f"{name:14} plain {medians['plain']:7.2f}, lossless {medians['lossless']:7.2f}:"
            f" {median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f})"
        )
        result[name] = {**medians, "ratio": median(ratios), "ratios": ratios}
    print(json.dumps({**result, "hardware": hardware(), "versions": versions()}))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
