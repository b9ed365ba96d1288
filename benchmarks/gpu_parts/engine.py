"""Part `engine`: a model of few layers and full width, end to end.

    python -m gpu_parts.engine qwen3-30b-8l

For each way of running: seconds to load and to capture, memory left, then decoding at several batch sizes, then
prompts: one at the beginning of a context, one behind a long context, many short ones. transformers' loop comes last.
Every number is a line of its own, so that a run that is cut short leaves the others.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_parts import tiny
from gpu_parts.lines import Lines, device, is_simulated, memory, peak_bytes_of, synchronize
from gpu_parts.sides import ALL, Side, Step
from make_checkpoint import make_checkpoint
from transformers import AutoModelForCausalLM

from moe_serve.hf.checkpoint import open_all_experts

CACHED_FRAC = 0.25
MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What is run; lengths in tokens."""

    batches: tuple[int, ...]
    new_tokens: int
    prompt: int
    long_context: int
    many: tuple[int, int]
    """Prompts, and the length of each."""
    settings: dict[str, Any]


FULL = Plan(
    batches=(1, 16, 64),
    new_tokens=24,
    prompt=2048,
    long_context=8192,
    many=(16, 128),
    settings={"dtype": "bfloat16", "max_model_len": 12288, "max_num_batched_tokens": 2048},
)
SIMULATED = Plan(
    *((1,), 3, 4, 8, (2, 3)),
    {"dtype": "float32", "max_model_len": 32, "num_kv_pages": 16, "max_num_batched_tokens": 4, "num_threads": 1},
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", help="of make_checkpoint.py; in simulation a tiny model of the same family")
    parser.add_argument("--sides", nargs="+", choices=[*ALL, "transformers"], default=[*ALL, "transformers"])
    args = parser.parse_args()
    lines = Lines("engine")
    with lines.row(size=args.size, what="checkpoint") as row:
        start = time.perf_counter()
        folder = checkpoint(args.size)
        row["seconds"] = time.perf_counter() - start
        row["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for side in args.sides if not lines.num_failures else ():
        run = _transformers if side == "transformers" else _side
        run(lines, {"size": args.size, "side": side}, folder, SIMULATED if is_simulated() else FULL)
        gc.collect()
        if not is_simulated():
            torch.cuda.empty_cache()
    return lines.exit_status()


def checkpoint(size: str) -> Path:
    """Random weights of that size, in simulation tiny ones; a later part finds them where an earlier one put them."""
    folder = Path(tempfile.gettempdir()) / size
    if is_simulated():
        return tiny.checkpoint("gpt_oss" if "oss" in size else "mixtral" if "mixtral" in size else "qwen3_moe", folder)
    return make_checkpoint(size, folder, device="cuda")


def cache_mib(folder: Path) -> int:
    """Of CACHED_FRAC of the experts."""
    if is_simulated():
        return tiny.cache_units()
    store = open_all_experts(str(folder))
    return int(store.num_total * store.slot_bytes * CACHED_FRAC) // MIB + 1


def _side(lines: Lines, known: dict[str, Any], folder: Path, plan: Plan) -> None:
    side: Side | None = None
    try:
        with lines.row(**known, what="load") as row:
            side = Side(folder, known["side"], cache_mib(folder), max_num_seqs=max(plan.batches), **plan.settings)
            row |= {"seconds": side.load_s, "graphs": side.graphs} | memory()
        if side is not None:
            _decoding(lines, known, side, plan)
            _prompts(lines, known, side, plan)
    finally:
        if side is not None:
            side.close()


def _decoding(lines: Lines, known: dict[str, Any], side: Side, plan: Plan) -> None:
    for batch in plan.batches:
        with lines.row(**known, what="decoding", batch=batch) as row:
            before = side.counters()
            steps = side.steps(tiny.prompts((4,) * batch, seed=batch), plan.new_tokens)
            times = decoding_s(steps, batch)
            row |= {"step_s": statistics.median(times), "steps": len(times)}
            row["tokens_per_s"] = batch / row["step_s"]
            row |= {name: value - before[name] for name, value in side.counters().items()}


def decoding_s(steps: Sequence[Step], batch: int) -> list[float]:
    """Seconds of the steps that only decode, and all sequences; the first of them may compile something."""
    found = [step.seconds for step in steps if step.prompt_tokens == 0 and step.new_tokens == batch]
    return found[1:] or found


def _prompts(lines: Lines, known: dict[str, Any], side: Side, plan: Plan) -> None:
    behind = plan.long_context + plan.prompt
    cases = {"a prompt": (plan.prompt,), "behind a context": (behind,), "many prompts": (plan.many[1],) * plan.many[0]}
    for seed, (what, lengths) in enumerate(cases.items(), 100):
        with lines.row(**known, what=what, prompts=len(lengths), length=lengths[0]) as row:
            steps: list[Step] = []
            prompts = tiny.prompts(lengths, seed)
            row |= peak_bytes_of(lambda prompts=prompts, steps=steps: steps.extend(side.steps(prompts, 1)))  # type: ignore[misc]
            row["step_tokens"] = [step.prompt_tokens for step in steps]
            row["step_s"] = [step.seconds for step in steps]
            row |= memory()


def _transformers(lines: Lines, known: dict[str, Any], folder: Path, plan: Plan) -> None:
    """generate() with grouped_mm, all on the GPU."""
    model: Any = None
    with lines.row(**known, what="load") as row:
        dtype = getattr(torch, plan.settings["dtype"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="grouped_mm")
        model = model.to(device()).eval()
        row |= memory()
    for batch in plan.batches if model is not None else ():
        with lines.row(**known, what="decoding", batch=batch) as row:
            times = _generated_s(model, torch.tensor(tiny.prompts((4,) * batch), device=device()), plan.new_tokens)
            row |= {"step_s": statistics.median(times), "steps": len(times)}
            row["tokens_per_s"] = batch / row["step_s"]


def _generated_s(model: Any, ids: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds between forward passes, without the prompt's."""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        synchronize()
        marks.append(time.perf_counter())

    hook = model.register_forward_hook(mark)
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)
    hook.remove()
    return [after - before for before, after in itertools.pairwise(marks)]


if __name__ == "__main__":
    sys.exit(main())
