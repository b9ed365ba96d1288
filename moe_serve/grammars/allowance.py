"""What compiling a grammar may take: CPU time, and a longer time by the clock, since it runs on time that others leave.

Knows processes by their ids; knows no grammars.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

STARVING_S = 0.5
STARVING_SHARE = 0.02
"""Of one core. Below it, after STARVING_S, a process on idle time is starving."""
CPU_CLOCK = 2
"""Linux: which of a process's clocks counts the time that it ran."""
SHORTEST_PAUSE_S = 0.005


class TooSlowError(Exception):
    """The time for compiling is over."""

    def __init__(self, is_busy: bool = False) -> None:
        """`is_busy`: the machine gave it less CPU time than it might have used."""
        super().__init__()
        self.is_busy = is_busy


class StarvedError(Exception):
    """Others leave it next to no CPU time."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """For one try."""

    cpu_s: float
    wall_s: float
    is_idle: bool
    """It gets only the time that others leave, until it starves."""

    def pause_s(self, cpu_s: float, wall_s: float) -> float:
        """How long to wait until asking again, after so much CPU time and time. TooSlowError, StarvedError."""
        if cpu_s >= self.cpu_s:
            raise TooSlowError
        if wall_s >= self.wall_s:
            raise TooSlowError(is_busy=True)
        if self.is_idle and wall_s >= STARVING_S and cpu_s < STARVING_SHARE * wall_s:
            raise StarvedError
        return max(min(self.cpu_s - cpu_s, self.wall_s - wall_s, STARVING_S), SHORTEST_PAUSE_S)


def cpu_seconds(pid: int) -> float:
    """That a process, all its threads together, has run. OSError: there is none."""
    return time.clock_gettime(~pid << 3 | CPU_CLOCK)
