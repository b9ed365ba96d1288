"""How much of the machine its host gave to others while a benchmark ran: steal time, in virtual machines only.

A minute in which half of every core is gone is an overload that no server caused. Knows no server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

SAMPLE_S = 1.0
WINDOW_S = 10.0
MUCH_FRAC = 0.1
"""Of all CPU time in a window: more makes capacity another one."""
AFTER_S = 30.0
"""Time for a queue to drain afterwards."""


class StealLog(threading.Thread):
    """The fraction of CPU time stolen, once a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        """(time.monotonic() at the end, fraction stolen) of each second."""
        self._done = threading.Event()

    def run(self) -> None:
        stolen, total = _cpu_times()
        while not self._done.wait(SAMPLE_S):
            now_stolen, now_total = _cpu_times()
            self.samples.append((time.monotonic(), (now_stolen - stolen) / max(1, now_total - total)))
            stolen, total = now_stolen, now_total

    def stop(self) -> None:
        """No more samples."""
        self._done.set()
        self.join()

    def windows(self) -> list[tuple[float, float]]:
        """(end, mean fraction) of windows one after the other."""
        size = int(WINDOW_S / SAMPLE_S)
        parts = [self.samples[i : i + size] for i in range(0, len(self.samples), size)]
        return [(part[-1][0], sum(frac for _, frac in part) / len(part)) for part in parts]

    def summary(self, moments_s: Iterable[float]) -> dict[str, float]:
        """Mean and worst window, seconds with much stolen, and how many of `moments_s` lie in those or soon after."""
        windows = self.windows()
        ends = [end for end, frac in windows if frac > MUCH_FRAC]
        near = sum(any(end - WINDOW_S <= moment < end + AFTER_S for end in ends) for moment in moments_s)
        return {
            "mean_frac": round(sum(frac for _, frac in self.samples) / max(1, len(self.samples)), 4),
            "worst_window_frac": round(max((frac for _, frac in windows), default=0.0), 4),
            "much_stolen_s": WINDOW_S * len(ends),
            "refused_then": near,
        }


def _cpu_times() -> tuple[int, int]:
    """Stolen and all CPU time since boot, in ticks; 0 of 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0, 0
    fields = [int(value) for value in stat.read_text().splitlines()[0].split()[1:9]]
    return fields[7], sum(fields)
