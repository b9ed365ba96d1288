"""What the benchmarks share: a clock for decode steps, a fair environment, and facts about the machine.

Imports torch only inside functions: `fix_environment` must run before torch does.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "moe-serve")


def fix_environment(threads: int) -> None:
    """The same threads and no spinning for everyone. Call before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    # A spinning OpenMP worker would count as CPU time without doing anything.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Decode:
    """Speed of the steps in which every sequence decoded and nothing else ran."""

    num_steps: int
    tokens_per_cpu_s: float
    """process_time of all threads of the process."""
    tokens_per_wall_s: float


class StepClock:
    """Marks the start of every engine step and keeps those that decode the whole batch.

    A step lasts until the next mark, so that scheduling, sampling and bookkeeping between two
    forward passes count, for every side alike. Steps with a part of a prompt, or in which some
    sequences have finished, do not count: they would mix prefill speed or a smaller batch in.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[int, float, float]] = []

    def mark(self, num_tokens: int) -> None:
        """A step over `num_tokens` tokens begins, or, with 0, the last one has ended."""
        self._marks.append((num_tokens, time.process_time(), time.perf_counter()))

    def relabel_last(self, num_tokens: int) -> None:
        """Set the size of the step marked last, where it is known only afterwards."""
        self._marks[-1] = (num_tokens, *self._marks[-1][1:])

    def decode(self, batch: int) -> Decode:
        """Speed over the steps of exactly `batch` tokens."""
        pairs = [(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False) if a[0] == batch]
        if not pairs:
            raise RuntimeError(f"no step decoded all {batch} sequences; raise --new-tokens")
        cpu_s = sum(b[1] - a[1] for a, b in pairs)
        wall_s = sum(b[2] - a[2] for a, b in pairs)
        return Decode(len(pairs), batch * len(pairs) / cpu_s, batch * len(pairs) / wall_s)

    def cpu_times_s(self, batch: int) -> list[float]:
        """CPU seconds of each such step, in order."""
        return [b[1] - a[1] for a, b in zip(self._marks, self._marks[1:], strict=False) if a[0] == batch]


def versions() -> dict[str, str]:
    """Installed versions of what is compared."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, and memory in GiB."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(kib / 2**20, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def save_json(file: Path | None, report: dict[str, Any]) -> None:
    """Write what is known so far, so that a run which is cut short leaves it. None: nowhere."""
    if file is not None:
        file.write_text(json.dumps(report, indent=1))


def rss_mb(pid: int | str = "self") -> dict[str, float]:
    """RssAnon, RssFile, and VmHWM (peak of the sum) of a process, in MB (10^6 bytes)."""
    wanted = ("RssAnon", "RssFile", "VmHWM")
    rows = (line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {key: int(value.split()[0]) * 1024 / 1e6 for key, value in (r[:2] for r in rows) if key in wanted}


def median(values: list[float]) -> float:
    return statistics.median(values)
