"""What the parts of gpu_10min.sh share: the device, a clock, and result lines that are on disk once they are written.

In simulation (TRITON_INTERPRET=1) the device is the CPU and its seconds say nothing of a GPU: each line says so.
Knows no part.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

LINES_FILE = "GPU_LINES"
"""Environment variable: the file that lines go to. Unset: only printed."""
MOST_TRACEBACK = 1500
"""Characters of a traceback in a line, its end."""
Call = Callable[[], object]


def is_simulated() -> bool:
    """Triton runs in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cpu" if is_simulated() else "cuda")


class Lines:
    """JSON lines of one part; a failure becomes a line too, and the part goes on."""

    def __init__(self, part: str) -> None:
        self._facts = {"part": part, "simulated": is_simulated()}
        self._start = time.perf_counter()
        self.num_failures = 0

    def add(self, **row: Any) -> None:
        """Write a line, and wait until it is on disk."""
        at_s = round(time.perf_counter() - self._start, 3)
        text = json.dumps(self._facts | {"at_s": at_s} | row, default=str)
        print(text, flush=True)
        if file := os.environ.get(LINES_FILE):
            with Path(file).open("a") as out:
                out.write(text + "\n")
                out.flush()
                os.fsync(out.fileno())

    @contextmanager
    def row(self, **known: Any) -> Iterator[dict[str, Any]]:
        """A line with what is `known` and what the caller puts into the dict; or with the error that ended it."""
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as error:  # the next line still has something to tell
            self.num_failures += 1
            found["error"] = repr(error)[:MOST_TRACEBACK]
            found["traceback"] = traceback.format_exc()[-MOST_TRACEBACK:]
        self.add(**known, **found)

    def exit_status(self) -> int:
        """1 if a line tells of an error."""
        return min(1, self.num_failures)


def seconds_of(work: Call) -> float:
    """Seconds of `work`: the median on a GPU, one run in simulation."""
    if not is_simulated():
        from moe_serve_kernels.gpu import timing

        return timing.seconds_of(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_per_call(calls: Sequence[Call]) -> float:
    """Seconds of one of `calls` on the average: captured in one graph on a GPU; the first one in simulation."""
    if is_simulated():
        return seconds_of(calls[0])
    from moe_serve_kernels.gpu import timing

    return timing.seconds_per_call(calls)


def synchronize() -> None:
    """Wait for the GPU."""
    if not is_simulated():
        torch.cuda.synchronize()


def peak_bytes_of(work: Call) -> dict[str, float]:
    """Seconds of `work`, run once, and the most bytes that torch kept on the GPU meanwhile beyond those before."""
    before = 0
    if not is_simulated():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    seconds = time.perf_counter() - start
    peak = 0 if is_simulated() else torch.cuda.max_memory_allocated() - before
    return {"seconds": seconds, "peak_bytes": peak}


def memory() -> dict[str, int]:
    """Bytes that are free on the GPU, that it has, and that torch's tensors take."""
    if is_simulated():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"free_bytes": free, "total_bytes": total, "torch_bytes": torch.cuda.memory_allocated()}
