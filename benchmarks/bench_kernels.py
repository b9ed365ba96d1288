"""One MoE layer's experts on this GPU: our kernels and everybody else's, against the GPU's own limits.

    python benchmarks/bench_kernels.py [--models mixtral qwen3 ...] [--tokens 1 16 ...] [--formats plain int4 ...]
        [--json FILE]

Limits are measured in the same run: bytes per second of a large copy, bf16 operations per second of a large matrix
product. The floor of a call is the time its bytes (every touched expert once, activations) or its operations need at
those limits, whichever is longer; routing is uniform and random, and touched experts are counted. Calls are replayed
from a CUDA graph over layers that together exceed the L2 cache several times; what cannot be captured is launched
from Python and marked so. Every result is compared with ours before it is timed. The last line is JSON, which --json
also writes after every row: what is most wanted comes first, and a run that is cut short leaves what it has.

Shape alphabet: T tokens, K choices, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from kernel_peers import peers
from measuring import hardware, save_json, versions

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import timing
from moe_serve_kernels.gpu.moe_layer import config_for, moe_layer
from moe_serve_kernels.gpu.pool import ExpertPool
from moe_serve_kernels.gpu.tuned import Shape
from moe_serve_kernels.gpu.tuning import random_layers
from moe_serve_kernels.gpu.weight_format import Format

MODELS = {
    "mixtral": (4096, 14336, 8, 2),
    "qwen3": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
    "deepseek-v2-lite": (2048, 1408, 64, 6),
}
"""H, I, E, K of Mixtral 8x7B, Qwen3-30B-A3B, OLMoE 1B-7B and DeepSeek-V2-Lite (routed experts)."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
BYTES_PER_WEIGHT = {"plain": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + 8 / 128}
SILU = Activation("silu")
MOST_COPIED_BYTES = 8e9
"""batched_mm copies a pair's whole expert: beyond this it is left out."""
TOLERANCE = 0.03
"""Of the largest result: bf16 rounding in another order."""


@dataclass(frozen=True)
class Limits:
    """What this GPU reaches, measured."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True)
class Case:
    """One call: the inputs and what it must cost at least."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    num_bytes: float
    flop: float

    def floor_s(self, limits: Limits) -> float:
        return max(self.num_bytes / limits.bytes_per_s, self.flop / limits.flop_per_s)


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("bench_kernels needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    limits = measure_limits()
    print(f"copy {limits.bytes_per_s / 1e9:.0f} GB/s, matrix product {limits.flop_per_s / 1e12:.0f} TFLOP/s (bf16)")
    rows: list[dict[str, Any]] = []
    report = {"gpu": torch.cuda.get_device_name(), "hardware": hardware(), "versions": versions(), "rows": rows}
    report |= {"limits": dataclasses.asdict(limits)}
    for format in args.formats:
        for model in args.models:
            for row in bench(model, format, args.tokens, limits):
                print(describe(row), flush=True)
                rows.append(row)
                save_json(args.json, report)
            torch.cuda.empty_cache()
    print(json.dumps(report))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--formats", nargs="+", choices=BYTES_PER_WEIGHT, default=list(BYTES_PER_WEIGHT))
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def measure_limits() -> Limits:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = timing.seconds_of(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_s = timing.seconds_of(lambda: torch.mm(a, b))
    return Limits(2 * source.nbytes / copy_s, 2 * 8192**3 / product_s)


def make_case(shape: Shape, num_tokens: int) -> Case:
    scores = torch.rand(num_tokens, shape.num_experts, device="cuda")
    weights, ids = scores.topk(shape.top_k)
    touched, pairs = ids.unique().numel(), ids.numel()
    per_expert = 3 * shape.hidden * shape.inner
    x = torch.randn(num_tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
    num_bytes = touched * per_expert * BYTES_PER_WEIGHT[shape.format] + 2 * x.nbytes + 2 * 2 * pairs * shape.inner
    return Case(x, ids, weights, num_bytes, 2.0 * pairs * per_expert)


def bench(model: str, format: Format, tokens: list[int], limits: Limits) -> Iterator[dict[str, Any]]:
    shape = Shape(*MODELS[model], format)
    pool, tables = random_layers(shape, torch.bfloat16, torch.device("cuda"))
    for num_tokens in tokens:
        case = make_case(shape, num_tokens)
        calls = [partial(moe_layer, case.x, case.ids, case.weights, table, pool, SILU) for table in tables]
        config = config_for(case.x, case.ids, shape.num_experts, pool)
        yield row_of(model, "ours", case, timing.seconds_per_call(calls), limits) | {"config": str(config)}
        if format == "plain":
            yield from bench_peers(model, shape, case, pool, len(tables), limits)


def bench_peers(
    model: str, shape: Shape, case: Case, pool: ExpertPool, num_layers: int, limits: Limits
) -> Iterator[dict[str, Any]]:
    for name, make, can_be_captured in peers():
        if name == "transformers batched_mm" and case.ids.numel() * 6 * shape.hidden * shape.inner > MOST_COPIED_BYTES:
            continue
        try:
            calls = [make_call(make, shape, case, pool, layer) for layer in range(num_layers)]
            check(calls[0](), shape, case, pool)
            time_s = timing.seconds_per_call(calls) if can_be_captured else launched_s(calls)
        except (RuntimeError, ImportError, AttributeError, TypeError, NotImplementedError) as error:
            print(f"{model} T={len(case.x)} without {name}: {str(error).splitlines()[0] if str(error) else error!r}")
            torch.cuda.empty_cache()
            continue
        yield row_of(model, name, case, time_s, limits) | {"graph": can_be_captured}


def make_call(
    make: Callable[..., Any], shape: Shape, case: Case, pool: ExpertPool, layer: int
) -> Callable[[], torch.Tensor]:
    """The peer over the slots of one layer, in order."""
    slots = slice(layer * shape.num_experts, (layer + 1) * shape.num_experts)
    run = make(pool.gate_up.data[slots].flatten(1, 2), pool.down.data[slots])
    return lambda: run(case.x, case.ids, case.weights)


def check(got: torch.Tensor, shape: Shape, case: Case, pool: ExpertPool) -> None:
    """RuntimeError unless it is what we get over the same slots."""
    table = torch.arange(shape.num_experts, dtype=torch.int32, device="cuda")
    ours = moe_layer(case.x, case.ids, case.weights, table, pool, SILU).float()
    difference = float((got.float() - ours).abs().max() / ours.abs().max())
    if difference > TOLERANCE:
        raise RuntimeError(f"another result: {difference:.3f} of the largest")


def launched_s(calls: Sequence[Callable[[], object]]) -> float:
    def run() -> None:
        for call in calls:
            call()

    return timing.seconds_of(run, 5) / len(calls)


def row_of(model: str, name: str, case: Case, time_s: float, limits: Limits) -> dict[str, Any]:
    return {
        "model": model,
        "name": name,
        "tokens": len(case.x),
        "time_us": time_s * 1e6,
        "gb_per_s": case.num_bytes / time_s / 1e9,
        "tflop_per_s": case.flop / time_s / 1e12,
        "roofline_frac": case.floor_s(limits) / time_s,
    }


def describe(row: dict[str, Any]) -> str:
    line = f"{row['model']:<17} T={row['tokens']:<5} {row['name']:<23} {row['time_us']:>9.1f} us"
    line += f" {row['gb_per_s']:>6.0f} GB/s {row['tflop_per_s']:>6.1f} TFLOP/s"
    line += f"  {row['roofline_frac']:>6.1%} of the roofline"
    return line + ("" if row.get("graph", True) else "  (no graph)")


if __name__ == "__main__":
    sys.exit(main())
