"""The grid: decoding at several widths and prompts of several lengths, moe-serve beside llama.cpp, in turn.

    python benchmarks/bench_grid.py WORK [--llama TREE] [--models mixtral-300m qwen3-1b] [--weights bf16 int8 int4]
        [--dtypes auto float32 bfloat16] [--isa avx2 --llama-build build-avx2] [--same-file]

WORK is a folder for the random checkpoints and their GGUF twins; what is there is used again. `--weights`: bf16 beside
GGUF's BF16, int8 beside Q8_0, int4 (groups of 128) beside Q4_K_M, which rounds otherwise and takes 4.5 to 4.8 bits.
With --same-file moe-serve runs the GGUF files too: the same weights on both sides.
A cell is tokens/s of wall time, the median over the rounds. Every round runs each side once, with prompts of its own.
`floor`: the rate at which the weights of one token can be read, by the fastest loop of this run; bf16, width 1 only.
Without --llama the peer is left out. `--isa` holds moe-serve to a lesser instruction set. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_decode import read_rate, token_bytes
from llama_cpp import LlamaCpp
from measuring import fix_environment, hardware, median, save_json, versions

from moe_serve.openmp import spin_briefly

PEER = "llama.cpp"
GGUF_KINDS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_k_m"}
BITS = {"int8": 8, "int4": 4}
DECODE_PROMPT = 32
Speeds = dict[tuple[str, str], list[float]]
"""(cell, side) -> one figure per round."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--llama", type=Path, metavar="TREE", help="llama.cpp's source tree, built")
    parser.add_argument("--llama-build", default="build", metavar="NAME", help="the build's folder in TREE")
    parser.add_argument("--models", nargs="+", default=["mixtral-300m", "qwen3-1b"], help="of make_checkpoint.py")
    parser.add_argument("--weights", nargs="+", choices=GGUF_KINDS, default=list(GGUF_KINDS))
    parser.add_argument("--dtypes", nargs="+", default=["auto"], help="moe-serve's; only `auto` for int8 and int4")
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", help="MOE_SERVE_MAX_CPU_ISA for moe-serve: avx512, avx2 or generic")
    parser.add_argument("--same-file", action="store_true", help="moe-serve runs llama.cpp's GGUF files as well")
    parser.add_argument("--json", type=Path, help="where to keep what is known so far")
    args = parser.parse_args()
    if args.same_file and not args.llama:
        parser.error("--same-file needs --llama, which makes the files")
    return args


def main() -> int:
    args = parse_args()
    fix_environment(args.threads)
    del os.environ["OMP_WAIT_POLICY"]
    spin_briefly(os.environ)  # as `moe-serve serve` does
    if args.isa:
        os.environ["MOE_SERVE_MAX_CPU_ISA"] = args.isa
    import torch

    torch.set_num_threads(args.threads)
    llama = LlamaCpp(args.llama, args.llama_build, args.threads) if args.llama else None
    report: dict[str, Any] = {"grids": {}, "isa": args.isa, "llama_cpp": llama and llama.version()}
    report["same_file"] = args.same_file
    report |= {"hardware": hardware(), "versions": versions(), "threads": args.threads}
    for model in args.models:
        for weights in args.weights:
            report["grids"][f"{model} {weights}"] = run_grid(args, model, weights, llama)
            save_json(args.json, report)
    print(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


def run_grid(args: argparse.Namespace, model: str, weights: str, llama: LlamaCpp | None) -> dict[str, Any]:
    """All cells of one checkpoint, printed as a table as well."""
    from make_checkpoint import make_checkpoint

    folder = make_checkpoint(model, args.work / model)
    gguf = llama.convert(folder, GGUF_KINDS[weights]) if llama else None
    sides = open_sides(args, folder, weights, gguf)
    speeds: Speeds = {}
    rates: list[float] = []
    for number in range(args.rounds + 1):  # the first touches pages
        found = one_round(args, sides, random.Random(number))
        if number and llama and gguf:
            found |= peer_round(args, llama, gguf)
        for key, speed in found.items() if number else ():
            speeds.setdefault(key, []).append(speed)
        rates.append(read_rate())
    for side in sides.values():
        side.close()
    sides.clear()
    gc.collect()
    floor = max(rates) * 1e9 / token_bytes(str(folder)) if weights == "bf16" else None
    name = GGUF_KINDS[weights] if args.same_file else weights
    return summary(f"{model} {name}", speeds, floor)


def open_sides(args: argparse.Namespace, folder: Path, weights: str, gguf: Path | None) -> dict[str, Any]:
    """One engine per compute dtype."""
    from engine_sides import MoEServe

    from moe_serve.hub.find import find_model

    model = folder if weights == "bf16" else quantised(folder, BITS[weights])
    if args.same_file:
        model = Path(find_model(str(gguf)))
    dtypes: Sequence[str] = args.dtypes if weights == "bf16" else ["auto"]
    longest = max([*args.prompts, DECODE_PROMPT]) + args.new_tokens + 1
    width = max(args.widths)
    return {
        dtype: MoEServe(str(model), dtype, args.threads, longest, width, enable_prefix_caching=False)
        for dtype in dtypes
    }


def quantised(folder: Path, bits: int) -> Path:
    """The checkpoint with experts of so many bits, made once beside it."""
    from moe_serve.quantization.writing import write_quantized
    from moe_serve_base.whole_files import whole_folder

    target = folder.with_name(f"{folder.name}-int{bits}")
    if not target.exists():
        with whole_folder(target) as partial:
            write_quantized(str(folder), partial, bits, 128 if bits == 4 else 0, None, lambda: None)
    return target


def one_round(args: argparse.Namespace, sides: dict[str, Any], draw: random.Random) -> dict[tuple[str, str], float]:
    """Every cell once on each of our sides, side after side within a cell."""
    found = {}
    for width in args.widths:
        prompts = [prompt(draw, DECODE_PROMPT) for _ in range(width)]
        for name, side in sides.items():
            run = side.run(prompts, args.new_tokens)
            found[f"decode x{width}", name] = run.clock.decode(width).tokens_per_wall_s
    for length in args.prompts:
        ids = prompt(draw, length)
        for name, side in sides.items():
            start = time.perf_counter()
            side.run([ids], 1)
            found[f"prefill {length}", name] = length / (time.perf_counter() - start)
    return found


def peer_round(args: argparse.Namespace, llama: LlamaCpp, gguf: Path) -> dict[tuple[str, str], float]:
    found = {}
    for width in args.widths:
        found[f"decode x{width}", PEER] = llama.decode(gguf, width, DECODE_PROMPT, args.new_tokens)
    for length in args.prompts:
        found[f"prefill {length}", PEER] = llama.prefill(gguf, length)
    return found


def prompt(draw: random.Random, length: int) -> list[int]:
    """Random token ids of the demo tokenizer's ordinary range."""
    return [draw.randrange(5, 4000) for _ in range(length)]


def summary(name: str, speeds: Speeds, floor: float | None) -> dict[str, Any]:
    """Print the table; returns {cell: {side: {tokens_per_s, ratio}}}, with the DRAM floor of width 1."""
    cells: dict[str, Any] = {}
    for cell, side in speeds:
        speed = median(speeds[cell, side])
        ratios = [ours / theirs for ours, theirs in zip(speeds[cell, side], speeds.get((cell, PEER), []), strict=False)]
        cells.setdefault(cell, {})[side] = {"tokens_per_s": speed, "ratio": median(ratios) if ratios else None}
    print(f"\n{name}" + (f"; floor of x1: {floor:.1f} tokens/s" if floor else ""))
    for cell, row in cells.items():
        print(f"  {cell:13}", "  ".join(_entry(side, found) for side, found in row.items()), flush=True)
    return {"cells": cells, "floor_tokens_per_s": floor, "rounds": {" | ".join(k): v for k, v in speeds.items()}}


def _entry(side: str, found: dict[str, Any]) -> str:
    ratio = "" if found["ratio"] is None or side == PEER else f" ({found['ratio']:.2f}x)"
    return f"{side} {found['tokens_per_s']:8.1f}{ratio}"


if __name__ == "__main__":
    sys.exit(main())
