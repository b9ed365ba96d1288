"""Attention of a decoding token: keys and values cached, against latents cached and queries carried over to them.

    python benchmarks/bench_latents.py --threads 2

One layer of DeepSeek-V2-Lite's and of V3's size, bf16 weights, float32 activations, one sequence. Both sides start
from the query and the new token's latents, end with what all heads attended to, and use our kernels; `keys` makes the
new token's keys and values first. Layers take turns, so that their weights and caches come from memory as they do
between the layers of a model; both sides in turn, the least time counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, versions

HEADS = {"V2-Lite": 16, "V3": 128}
RANK, PLAIN, ROTARY, VALUE = 512, 128, 64, 128
CONTEXTS = (128, 512, 2048, 8192)
PAGE_SIZE = 16
LAYERS = 3
ROUNDS = 7
MOST_BYTES = 3 << 30
"""Of keys and values; V3's longest context is left out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    fix_environment(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    rows = [row for name in HEADS for context in CONTEXTS if (row := bench(name, context))]
    print(json.dumps({"threads": args.threads, "rows": rows, "hardware": hardware(), "versions": versions()}))
    return 0


def bench(name: str, context: int) -> dict[str, Any] | None:
    heads = HEADS[name]
    key_bytes, latent_bytes = heads * (PLAIN + ROTARY + VALUE) * 4, (RANK + ROTARY) * 4
    if key_bytes * context * LAYERS > MOST_BYTES:
        return None
    best = interleaved({"keys": with_keys(heads, context), "latents": with_latents(heads, context)})
    ratio = best["latents"] / best["keys"]
    row = {"model": name, "context": context, "ratio": ratio, "bytes_ratio": latent_bytes / key_bytes}
    milliseconds = {f"{side}_ms": 1e3 * seconds for side, seconds in best.items()}
    told = ", ".join(f"{side} {1e3 * seconds:7.2f} ms" for side, seconds in best.items())
    print(f"{name:8s} context {context:5d}: {told}; time {ratio:.2f}, memory {row['bytes_ratio']:.3f}")
    return row | milliseconds


def interleaved(sides: dict[str, Callable[[int], Any]]) -> dict[str, float]:
    """Least seconds of each for one layer."""
    best = dict.fromkeys(sides, float("inf"))
    for i in range(ROUNDS + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            for layer in range(LAYERS):
                run(layer)
            if i:
                best[side] = min(best[side], (time.perf_counter() - start) / LAYERS)
    return best


def with_keys(heads: int, context: int) -> Callable[[int], Any]:
    import torch

    from moe_serve_kernels.cpu.linear import LinearWeights, linear
    from moe_serve_kernels.cpu.paged_attention import paged_attention

    ups = [LinearWeights(weight.flatten(0, 1)) for weight in up_weights(heads)]
    tokens = -(-context // PAGE_SIZE) * PAGE_SIZE
    caches = [(torch.randn(heads, tokens, PLAIN + ROTARY), torch.randn(heads, tokens, VALUE)) for _ in range(LAYERS)]
    query, latents = torch.randn(1, heads, PLAIN + ROTARY), torch.randn(1, RANK)

    def run(layer: int) -> Any:
        keys, values = caches[layer]
        plain, value = linear(latents, ups[layer]).view(heads, -1).tensor_split([PLAIN], dim=-1)
        keys[:, context - 1, :PLAIN], values[:, context - 1] = plain, value
        return paged_attention(query, keys, values, *pages(context), page_size=PAGE_SIZE, scale=0.1)

    return run


def with_latents(heads: int, context: int) -> Callable[[int], Any]:
    import torch

    from moe_serve_kernels.cpu.latent_heads import LatentHeads
    from moe_serve_kernels.cpu.paged_attention import paged_attention

    layers = [LatentHeads(weight, PLAIN) for weight in up_weights(heads)]
    tokens = -(-context // PAGE_SIZE) * PAGE_SIZE
    caches = [torch.randn(1, tokens, RANK + ROTARY) for _ in range(LAYERS)]
    query, latents = torch.randn(heads, 1, PLAIN + ROTARY), torch.randn(1, RANK)

    def run(layer: int) -> Any:
        rows = caches[layer]
        rows[0, context - 1, :RANK] = latents
        carried = torch.cat([layers[layer].carry_over(query[..., :PLAIN]), query[..., PLAIN:]], dim=-1).transpose(0, 1)
        attended = paged_attention(carried, rows, rows[..., :RANK], *pages(context), page_size=PAGE_SIZE, scale=0.1)
        return layers[layer].carry_back(attended.transpose(0, 1))

    return run


def up_weights(heads: int) -> Any:
    """What makes keys and values of latents, of each layer."""
    import torch

    return [(torch.randn(heads, PLAIN + VALUE, RANK) * 0.05).bfloat16() for _ in range(LAYERS)]


def pages(context: int) -> tuple[Any, Any]:
    """A page table and the length of one sequence."""
    import torch

    return torch.randperm(-(-context // PAGE_SIZE), generator=torch.manual_seed(0))[None], torch.tensor([context])


if __name__ == "__main__":
    sys.exit(main())
