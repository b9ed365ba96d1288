"""Single calls of kernels, for tools that watch one process: compute-sanitizer (part `memcheck`) and ncu (part `ncu`).

    python -m gpu_parts.calls PART gemv grouped attend cache [--large]

Small with ragged ends, for a checker of memory; --large: of a published model's size, for a profiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from gpu_parts.lines import Lines, device, is_simulated, synchronize

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import tuning
from moe_serve_kernels.gpu.configs import FLOAT32, GEMV, Config, steps_of
from moe_serve_kernels.gpu.gpu_model import model_of
from moe_serve_kernels.gpu.moe_layer import moe_layer
from moe_serve_kernels.gpu.paged_attention import paged_decode
from moe_serve_kernels.gpu.pool import ExpertPool
from moe_serve_kernels.gpu.residency import Copies, copy_experts, new_residency, plan
from moe_serve_kernels.gpu.tuned import Shape
from moe_serve_kernels.gpu.weight_format import Format

PAGE = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("names", nargs="+", choices=CALLS)
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    lines = Lines(args.part)
    for name in args.names:
        with lines.row(call=name, large=args.large) as row:
            result = CALLS[name](args.large and not is_simulated())
            synchronize()
            row["finite"] = bool(torch.isfinite(result.float()).all())
            assert row["finite"], "the result holds NaN or infinity"
    return lines.exit_status()


def dtype() -> torch.dtype:
    """Of activations and plain weights; the interpreter's bf16 products are wrong."""
    return torch.float32 if is_simulated() else torch.bfloat16


def layers_of(shape: Shape) -> tuple[ExpertPool, list[torch.Tensor]]:
    """As random_layers; in simulation two layers, where a GPU gets more than its L2 cache holds."""
    with mock.patch.object(tuning, "COLD_BYTES", 1 if is_simulated() else tuning.COLD_BYTES):
        return tuning.random_layers(shape, dtype(), device())


def _layer(num_tokens: int, shape: Shape, config: Config) -> torch.Tensor:
    pool, tables = layers_of(shape)
    x = torch.randn(num_tokens, shape.hidden, device=device()).to(dtype())
    weights, ids = torch.rand(num_tokens, shape.num_experts, device=device()).topk(shape.top_k)
    return moe_layer(x, ids, weights, tables[0], pool, Activation("silu"), config)


def _shape(large: bool, format: Format) -> Shape:
    return Shape(4096, 14336, 8, 2, format) if large else Shape(192, 136, 4, 2, format)


def _gemv(large: bool) -> torch.Tensor:
    """Codes of four bits where groups of 128 divide the inputs."""
    format: Format = "int4" if large else "plain"
    return _layer(1, _shape(large, format), GEMV[format])


def _grouped(large: bool) -> torch.Tensor:
    """The largest tile, with experts that leave a part of it empty."""
    config = FLOAT32 if is_simulated() else list(steps_of(model_of(device()), "plain").values())[-1]
    return _layer(4096 if large else 5 if is_simulated() else 150, _shape(large, "plain"), config)


def _attend(large: bool) -> torch.Tensor:
    seqs, context, kv_heads, dim = (64, 2048, 8, 128) if large else (2, 37, 2, 32)
    width = -(-context // PAGE)
    table = torch.randperm(seqs * width, device=device()).view(seqs, width)
    keys, values = (torch.randn(kv_heads, seqs * width * PAGE, dim, device=device()).to(dtype()) for _ in range(2))
    query = torch.randn(seqs, 4 * kv_heads, dim, device=device()).to(dtype())
    lengths = torch.full((seqs,), context, device=device())
    return paged_decode(query, keys, values, table, lengths, page_size=PAGE, scale=dim**-0.5)


@dataclass(frozen=True)
class Copying:
    """Experts on their way from host memory into slots; `run` copies what the last plan wants, again each time."""

    run: Callable[[], None]
    slot_of: torch.Tensor
    host: torch.Tensor
    slots: torch.Tensor
    num_bytes: int
    """Of one call of `run`."""


EXPERTS = (1, 4, 5)


def copying(large: bool) -> Copying:
    """Three experts of 4 KiB, or of 9 MiB: those of Qwen3-30B in bf16."""
    words = (9 << 20) // 8 if large else 512
    host = torch.arange(6 * words, dtype=torch.int64).view(6, words)
    host = host if is_simulated() else host.pin_memory()
    slots = torch.zeros(4, words, dtype=torch.int64, device=device())
    state = new_residency(1, 6, 4, device())
    tables = [[[part.data_ptr() for part in host]], [slots.data_ptr()], [8 * words]]
    copies = Copies(*(torch.tensor(table, dtype=torch.int64, device=device()) for table in tables))
    plan(state, 0, torch.tensor([EXPERTS], device=device()), (0, 4))
    return Copying(lambda: copy_experts(state, copies), state.slot_of, host, slots, len(EXPERTS) * 8 * words)


def _cache(large: bool) -> torch.Tensor:
    """Plan and copy."""
    made = copying(large)
    made.run()
    for expert in EXPERTS:
        slot = int(made.slot_of[expert])
        assert torch.equal(made.slots[slot].cpu(), made.host[expert]), f"expert {expert} did not arrive whole"
    return made.slots


CALLS: dict[str, Callable[[bool], torch.Tensor]] = {
    "gemv": _gemv,
    "grouped": _grouped,
    "attend": _attend,
    "cache": _cache,
}

if __name__ == "__main__":
    sys.exit(main())
