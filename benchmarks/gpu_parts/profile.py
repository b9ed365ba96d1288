"""Part `profile`: where a decoding step's and a prompt's time goes, by kernel.

    python -m gpu_parts.profile qwen3-30b-8l FOLDER

Writes decode.txt and prompt.txt into FOLDER: torch's table of kernels, whole; a line per kernel with its launches and
microseconds goes to the lines as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts import tiny
from gpu_parts.engine import FULL, SIMULATED, checkpoint
from gpu_parts.lines import Lines, is_simulated, synchronize
from gpu_parts.sides import Side
from torch.profiler import ProfilerActivity, profile

MOST_KERNELS = 40
"""Lines of one step: those that took longest."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    lines = Lines("profile")
    plan = SIMULATED if is_simulated() else FULL
    folder = checkpoint(args.size)
    side = Side(folder, "resident, graphs", 0, max_num_seqs=1, **plan.settings)
    try:
        side.steps(tiny.prompts((4,), 1), 2)
        with lines.row(step="decode", tokens=1) as row:
            row["kernels"] = table(lambda: side.steps(tiny.prompts((4,), 2), 3), args.out / "decode.txt")
        with lines.row(step="prompt", tokens=plan.prompt) as row:
            row["kernels"] = table(lambda: side.steps(tiny.prompts((plan.prompt,), 3), 1), args.out / "prompt.txt")
    finally:
        side.close()
    return lines.exit_status()


def table(work: Callable[[], object], file: Path) -> list[dict[str, Any]]:
    """Name, launches and microseconds of each kernel that `work` launches; of each operation in simulation."""
    activities = [ProfilerActivity.CPU] if is_simulated() else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        work()
        synchronize()
    averages = seen.key_averages()
    by = "self_cpu_time_total" if is_simulated() else "self_device_time_total"
    file.write_text(averages.table(sort_by=by, row_limit=-1, max_name_column_width=100))
    found = sorted(averages, key=lambda event: -getattr(event, by))[:MOST_KERNELS]
    return [{"name": e.key[:100], "count": e.count, "us": round(getattr(e, by), 1)} for e in found if getattr(e, by)]


if __name__ == "__main__":
    sys.exit(main())
