"""A captured decode step with an expert cache on this GPU: how long it takes by how many of its experts are missing.

    python benchmarks/bench_cached_layer.py [--model qwen3] [--layers 4]

Experts are in pinned host memory, a quarter of each layer's in slots. One graph holds plan, copies and products of all
layers; between replays only the router's choice changes. Printed beside it: the rate of one large pinned copy, which a
miss can at best have. The last line is JSON.

Shape alphabet: L layers, E experts, K choices, H hidden.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_kernels import MODELS, SILU
from measuring import hardware, save_json, versions

from moe_serve_kernels.gpu import timing
from moe_serve_kernels.gpu.cached_layer import CachedLayers
from moe_serve_kernels.gpu.pool import ExpertPool, empty_bank


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cached_layer needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    hidden, inner, num_experts, top_k = MODELS[args.model]
    layers, expert_bytes = make(hidden, inner, num_experts, args.layers)
    x = torch.randn(1, hidden, dtype=torch.bfloat16, device="cuda")
    weights = torch.full((1, top_k), 1 / top_k, device="cuda")
    ids = torch.arange(top_k, device="cuda")[None].clone()
    graph = timing.capture([functools.partial(layers.run, i, x, ids, weights, SILU) for i in range(args.layers)])
    rows = [measure(graph, layers, ids, misses, num_experts, args.layers, expert_bytes) for misses in range(top_k + 1)]
    link = pinned_bytes_per_s()
    for row in rows:
        print(
            f"{row['misses']} of {top_k} missing: {row['us_per_layer']:8.1f} us per layer, {row['gb_per_s']:5.1f} GB/s"
        )
    print(f"one large pinned copy: {link / 1e9:.1f} GB/s")
    facts = {"gpu": torch.cuda.get_device_name(), "hardware": hardware(), "versions": versions()}
    report = facts | {"model": args.model, "rows": rows, "pinned_bytes_per_s": link}
    save_json(args.json, report)
    print(json.dumps(report))
    return 0


def make(hidden: int, inner: int, num_experts: int, num_layers: int) -> tuple[CachedLayers, int]:
    """The cache, and the bytes of one expert."""
    slots = max(num_experts // 4, 2 * 2)
    shapes = ((2, inner, hidden), (hidden, inner))
    hosts = [
        {"data": list((torch.randn(num_layers * num_experts, *shape) * 0.02).to(torch.bfloat16).pin_memory())}
        for shape in shapes
    ]
    gate_up, down = hosts
    device = torch.device("cuda")
    banks = [empty_bank(num_layers * slots, shape, "plain", torch.bfloat16, device) for shape in shapes]
    ranges = [(i * slots, (i + 1) * slots) for i in range(num_layers)]
    expert_bytes = sum(host["data"][0].nbytes for host in hosts)
    return CachedLayers(gate_up, down, ExpertPool(*banks), num_experts, ranges), expert_bytes


def measure(
    graph: torch.cuda.CUDAGraph,
    layers: CachedLayers,
    ids: torch.Tensor,
    misses: int,
    num_experts: int,
    num_layers: int,
    expert_bytes: int,
) -> dict[str, float]:
    """Each replay chooses `misses` experts that were not chosen for long, and otherwise those of the last one."""
    following = ids.max() + 1
    before = int(layers.state.totals[1].sum())
    times = []
    for _ in range(3 * timing.REPLAYS):
        if misses:
            ids[0, :misses] = (following + torch.arange(misses, device="cuda")) % num_experts
            following += misses
        times.append(timing.once(graph.replay))
    copies = (int(layers.state.totals[1].sum()) - before) / len(times) / num_layers
    seconds = statistics.median(times) / num_layers
    return {
        "copies_per_layer": copies,
        "us_per_layer": seconds * 1e6,
        "gb_per_s": copies * expert_bytes / seconds / 1e9,
    }


def pinned_bytes_per_s() -> float:
    host = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(host, device="cuda")
    return host.nbytes / timing.seconds_of(lambda: target.copy_(host, non_blocking=True))


if __name__ == "__main__":
    sys.exit(main())
