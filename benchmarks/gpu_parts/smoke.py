"""Part `smoke`: a tiny model of one family through every way of running, against transformers and against itself.

    python -m gpu_parts.smoke mixtral

In float32, launched module by module and in graphs of few launches, the tokens must be those of transformers'
`generate` on the CPU. In bf16 each way rounds elsewhere, so only how many tokens are equal is told.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_parts.lines import Lines, is_simulated
from gpu_parts.sides import ALL, Side
from gpu_parts.tiny import cache_units, checkpoint, prompts
from transformers import AutoModelForCausalLM

SETTINGS: dict[str, Any] = {"num_threads": 1, "max_model_len": 64, "num_kv_pages": 16}


def main() -> int:
    family = sys.argv[1]
    lines = Lines("smoke")
    lengths, count = ((3,), 2) if is_simulated() else ((9, 30, 17), 16)
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint(family, Path(name))
        expected = _expected(folder, lengths, count)
        for side in ("resident, launched", "resident, graphs"):
            with lines.row(family=family, side=f"float32, {side}", expected=expected) as row:
                got = _run(row, folder, side, "float32", lengths, count)
                assert got == expected, "other tokens than transformers"
        # The interpreter's bf16 products are wrong; what runs is the same.
        dtype = "float32" if is_simulated() else "bfloat16"
        first: list[list[int]] = []
        for side in list(ALL)[2:] if is_simulated() else ALL:
            with lines.row(family=family, side=f"{dtype}, {side}") as row:
                got = _run(row, folder, side, dtype, lengths, count)
                first = first or got
                row["equal_frac"] = _equal_frac(first, got)
    return lines.exit_status()


def _run(
    row: dict[str, Any], folder: Path, name: str, dtype: str, lengths: tuple[int, ...], count: int
) -> list[list[int]]:
    max_num_seqs = 1 if is_simulated() else 4
    side = Side(folder, name, cache_units(), dtype=dtype, max_num_seqs=max_num_seqs, **SETTINGS)
    try:
        row |= {"graphs": side.graphs, "load_s": side.load_s}
        row["tokens"] = side.tokens(prompts(lengths), count)
        return list(row["tokens"])
    finally:
        side.close()


def _expected(folder: Path, lengths: tuple[int, ...], count: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    found = []
    for prompt in prompts(lengths):
        done = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        found.append([int(token) for token in done[0, len(prompt) :]])
    return found


def _equal_frac(expected: list[list[int]], got: list[list[int]]) -> float:
    pairs = [pair for a, b in zip(expected, got, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


if __name__ == "__main__":
    sys.exit(main())
