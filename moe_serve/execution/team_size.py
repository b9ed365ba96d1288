"""TeamSize: with how many threads a step is computed while other processes need cores too.

The threads of a step wait for one another many times. Beside a busy process one of them is often not running, and the
others wait some milliseconds each time: two threads on two cores then take 3 to 5 times as long, one thread takes 1.3
to 1.6 times. So a few steps now and then are a trial of fewer or more threads, at once where steps become slow, and the
faster size stays. A step's bits do not depend on its threads.

Knows durations; knows no kernels and no other processes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

SLOW = 1.5
"""Times its usual duration: such a step casts doubt on the size."""
SLOW_STEPS = 3
"""Of the last WINDOW steps: as many start a trial of fewer threads before its time."""
WINDOW = 8
TRIAL_STEPS = 3
MARGIN = 0.9
"""A size that is tried must need less than this part of the time that the present one does."""
FIRST_PAUSE, LAST_PAUSE = 64, 1024
"""Steps between two trials; doubled after each that failed, since a trial may cost as much as four steps."""
DRIFT = 1.002
"""Growth of a usual duration per step: contexts become longer."""


@dataclass
class _Trial:
    search: _Search
    size: int
    slowness: list[float] = field(default_factory=list)


@dataclass
class _Search:
    """For a better size among the smaller ones, or among the larger ones."""

    last: int = 0
    """Step of the last trial."""
    num_failed: int = 0

    def is_due(self, step: int, patient: bool) -> bool:
        pause = FIRST_PAUSE << min(self.num_failed, 8) if patient else FIRST_PAUSE
        return step - self.last >= min(pause, LAST_PAUSE)


class TeamSize:
    """How many threads compute the next step, 1 to `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._size = most
        self._trial: _Trial | None = None
        self._smaller, self._larger = _Search(), _Search()
        self._usual: dict[Hashable, float] = {}
        """By kind of step: the least seconds that `most` threads have needed of late."""
        self._recent: list[float] = []
        """Slowness of the last steps of the present size: duration over the usual one."""
        self._num_steps = 0

    def next(self) -> int:
        """Threads of the step that comes."""
        return self._size if self._trial is None else self._trial.size

    def took(self, kind: Hashable, duration_s: float) -> None:
        """The step with `next` threads is over. `kind`: steps of one kind take about as long as one another."""
        usual = self._usual.get(kind)
        if self.next() == self.most and (self._trial is None or usual is None):  # one measure within a trial
            self._usual[kind] = duration_s if usual is None else min(duration_s, usual * DRIFT)
        if usual is None or self.most == 1:
            return
        self._num_steps += 1
        if self._trial is None:
            self._observe(duration_s / usual)
        else:
            self._continue(self._trial, duration_s / usual)

    def _observe(self, slowness: float) -> None:
        self._recent = [*self._recent, slowness][-WINDOW:]
        is_slow = sum(some > SLOW for some in self._recent) >= SLOW_STEPS
        if len(self._recent) < TRIAL_STEPS:
            return
        if self._size < self.most and self._larger.is_due(self._num_steps, patient=True):
            self._trial = _Trial(self._larger, self._larger_size())
        elif self._size > 1 and self._smaller.is_due(self._num_steps, patient=not is_slow):
            self._trial = _Trial(self._smaller, self._smaller_size())

    def _smaller_size(self) -> int:
        """By 1, 2, 4, ... and 1 again: where several cores are busy, one thread less changes nothing."""
        distance = 1 << self._smaller.num_failed % self.most.bit_length()
        return max(self._size - distance, 1)

    def _larger_size(self) -> int:
        """All the way up, half of it, a quarter, ... and all again."""
        distance = (self.most - self._size) >> self._larger.num_failed % self.most.bit_length()
        return self._size + max(distance, 1)

    def _continue(self, trial: _Trial, slowness: float) -> None:
        trial.slowness.append(slowness)
        present = sum(self._recent) / len(self._recent)
        if slowness > present:  # one such step is answer enough: each may cost as much as four
            self._reject(trial)
        elif len(trial.slowness) == TRIAL_STEPS:
            if sum(trial.slowness) / TRIAL_STEPS < MARGIN * present:
                self._adopt(trial)
            else:
                self._reject(trial)

    def _adopt(self, trial: _Trial) -> None:
        self._size, self._recent, self._trial = trial.size, trial.slowness, None
        self._smaller, self._larger = _Search(self._num_steps), _Search(self._num_steps)

    def _reject(self, trial: _Trial) -> None:
        trial.search.last = self._num_steps
        trial.search.num_failed += 1
        self._trial = None
