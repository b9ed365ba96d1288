"""From how many tokens per expert would prepacked oneDNN or a conversion to float32 beat our CPU kernel?

    python benchmarks/bench_cpu_handover.py --threads 2

One expert of bf16 weights at a time, SwiGLU, float32 activations; several experts take turns, all sides in turn in
one process, the least time counts. Sides: our kernel on the weights as stored; `packed`: oneDNN on float32 weights
packed ahead of time, a copy of twice the size; `converted`: widened into a scratch buffer each time, then F.linear.
Ratios are times over ours: below 1 they are faster. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, versions

SHAPES = {"M1": (1024, 3584), "Qwen3": (2048, 768)}
EXPERTS = 4
ROUNDS = 8
TOKENS = (8, 16, 32, 64, 128, 256, 512)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    fix_environment(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    rows = [row for name in SHAPES for row in bench(name)]
    print(json.dumps({"threads": args.threads, "rows": rows, "hardware": hardware(), "versions": versions()}))
    return 0


def bench(name: str) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    import torch

    hidden, inner = SHAPES[name]
    experts = [
        tuple((torch.randn(shape) * 0.02).bfloat16() for shape in ((inner, hidden), (inner, hidden), (hidden, inner)))
        for _ in range(EXPERTS)
    ]
    makers = {"ours": ours(experts), "packed": packed(experts), "converted": converted(experts)}
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden)
        best = interleaved({side: functools.partial(run, x) for side, run in makers.items()})
        gflops = 6 * tokens * hidden * inner / best["ours"] / 1e9
        ratios = {side: best[side] / best["ours"] for side in ("packed", "converted")}
        rows.append({"shape": name, "tokens": tokens, "ms": 1e3 * best["ours"], "gflops": gflops, "ratios": ratios})
        told = ", ".join(f"{side} {ratio:.2f}" for side, ratio in ratios.items())
        milliseconds = 1e3 * best["ours"]
        print(f"{name} {tokens:4d} tokens: ours {milliseconds:7.2f} ms, {gflops:5.0f} GFLOP/s; times ours: {told}")
    return rows


def interleaved(sides: dict[str, Callable[[int], Any]]) -> dict[str, float]:
    """Least seconds of each."""
    best = dict.fromkeys(sides, float("inf"))
    for i in range(ROUNDS + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            run(i % EXPERTS)
            if i:
                best[side] = min(best[side], time.perf_counter() - start)
    return best


def ours(experts: Any) -> Callable[[Any, int], Any]:
    import torch

    from moe_serve_kernels.cpu.expert_mlp import Activation, MLPWeights, expert_mlp

    weights = [MLPWeights(*expert) for expert in experts]

    def run(x: Any, e: int) -> Any:
        out = torch.empty_like(x)
        expert_mlp(x, torch.arange(len(x)), [(0, len(x))], [weights[e]], Activation("silu"), out)
        return out

    return run


def packed(experts: Any) -> Callable[[Any, int], Any]:
    import torch

    pack = torch.ops.mkldnn._reorder_linear_weight
    weights = [tuple(pack(m.float().contiguous(), None) for m in expert) for expert in experts]

    def linear(x: Any, weight: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return lambda x, e: swiglu(linear, x, weights[e])


def converted(experts: Any) -> Callable[[Any, int], Any]:
    import torch
    from torch.nn import functional as F

    scratch = tuple(torch.empty(m.shape) for m in experts[0])

    def run(x: Any, e: int) -> Any:
        for wide, stored in zip(scratch, experts[e], strict=True):
            wide.copy_(stored)
        return swiglu(F.linear, x, scratch)

    return run


def swiglu(linear: Callable[[Any, Any], Any], x: Any, weights: Any) -> Any:
    from torch.nn import functional as F

    gate, up, down = weights
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


if __name__ == "__main__":
    sys.exit(main())
