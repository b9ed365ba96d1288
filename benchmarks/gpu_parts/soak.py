"""Part `soak`: thousands of steps of the cache that the GPU manages, each one's choice unlike the last.

The result of a step is known beforehand: each expert is a multiple of the identity, so a slot that was read before its
copy had landed, or that holds another expert, shows. Then table and owners must agree.

Shape alphabet: E experts, K choices, H hidden.
"""

from __future__ import annotations

import sys
import time

import torch
from gpu_parts.lines import Lines, device, is_simulated, synchronize

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu.cached_layer import CachedLayers
from moe_serve_kernels.gpu.pool import ExpertPool, empty_bank

EXPERTS, TOP_K, SLOTS = 32, 4, 8
EVERY = 100
"""Steps between two checks, which wait for the device."""


def main() -> int:
    lines = Lines("soak")
    hidden, steps = (16, 6) if is_simulated() else (512, 2000)
    with lines.row(what="steps of a cached layer", steps=steps) as row:
        start = time.perf_counter()
        row["misses"] = soak(hidden, steps)
        row["seconds"] = time.perf_counter() - start
    return lines.exit_status()


def soak(hidden: int, steps: int) -> int:
    """Experts that were copied. AssertionError: a wrong result, or a table that its slots' owners contradict."""
    dtype = torch.float32 if is_simulated() else torch.bfloat16
    layers = _layers(hidden, dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(1, hidden, dtype=dtype, device=device())
    weights = torch.ones(1, TOP_K, device=device())
    silu = float(torch.nn.functional.silu(torch.ones(())))
    wrong = torch.zeros((), device=device())
    for step in range(1, steps + 1):
        ids = torch.rand(1, EXPERTS, generator=generator).topk(TOP_K).indices
        expected = silu * sum(1 + int(i) for i in ids[0])
        got = layers.run(0, x, ids.to(device()), weights, Activation("silu"))
        wrong = torch.maximum(wrong, (got.float() / expected - 1).abs().max())
        if step % EVERY == 0 or step == steps:
            assert float(wrong) < 0.03, f"by step {step}: off by {float(wrong):.3f}"
            _check(layers)
    synchronize()
    return int(layers.state.totals[1].sum())


def _layers(hidden: int, dtype: torch.dtype) -> CachedLayers:
    """Gate and up are the identity; down is 1 + e times the identity for expert e."""
    eye = torch.eye(hidden, dtype=dtype)
    both = [torch.stack([eye, eye]) for _ in range(EXPERTS)]
    down = [eye * (1 + expert) for expert in range(EXPERTS)]
    hosts = [{"data": [t if is_simulated() else t.pin_memory() for t in parts]} for parts in (both, down)]
    shapes = ((2, hidden, hidden), (hidden, hidden))
    banks = [empty_bank(SLOTS, shape, "plain", dtype, device()) for shape in shapes]
    return CachedLayers(hosts[0], hosts[1], ExpertPool(*banks), EXPERTS, [(0, SLOTS)])


def _check(layers: CachedLayers) -> None:
    owners, table = layers.state.owner_of.tolist(), layers.state.slot_of.tolist()
    owned = {owner: slot for slot, owner in enumerate(owners) if owner >= 0}
    assert owned == {expert: slot for expert, slot in enumerate(table) if slot >= 0}, "table and owners disagree"


if __name__ == "__main__":
    sys.exit(main())
