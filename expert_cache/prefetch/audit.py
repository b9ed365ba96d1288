"""PrefetchAudit: does bringing experts ahead of time pay, in which layers, and is it still so?

Accuracy is not the goal: right predictions gain nothing where experts are resident or the disk is idle anyway, and
wrong ones take reading time from demands. So two things are measured on live traffic:

Whole steps, timed with prefetching and without it in turn, a few at a time (a probe). Prefetching stays on only if
    steps with it were faster. Between probes it is left as decided; the time to the next probe doubles while the
    answer stays the same, so that probing costs little either way.
Single layers, by their prefetched experts: those used, or on their way when the router asked, against the unused
    ones. A layer with mostly unused prefetches is left out until the next probe.

Both need more evidence to change their mind than to keep it. Knows no models; the clock is only for the engine's
thread. Prefetching only changes when bytes move, so no decision made here changes a bit of the results.

Shape alphabet: L MoE layers.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from expert_cache.prefetch.advisors import Advice
from expert_cache.report import CacheCounters

BLOCK_STEPS = 4
"""Steps in a row with prefetching, or without; the first of each still shows the other's traces and is not timed."""
PROBE_BLOCKS = 6
"""With and without in turn."""
FIRST_HOLD_STEPS = 128
LONGEST_HOLD_STEPS = 4096
TURN_ON_RATIO = 0.98
"""Steps with prefetching must take at most this much of the time without it to be turned on; on, they may take 1."""
CLEARLY_FASTER_FRAC = 0.7
"""Of all pairs of a step with and one without: chance alone reaches this once in 15 times with 9 steps of each."""
TURN_OFF_USEFUL_FRAC = 0.3
"""A layer's prefetching is turned off if a smaller share of its prefetched experts was used."""
TURN_ON_USEFUL_FRAC = 0.5
"""It is turned on again from this share on."""
FEWEST_EXPERTS = 8
"""Brought ahead of time for a layer before it is judged."""


class PrefetchAudit:
    """Asked per layer whether to prefetch for it; told when steps begin and end."""

    def __init__(
        self, counters: CacheCounters, expert_bytes: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._counters = counters
        self._expert_bytes = expert_bytes
        self._clock = clock
        self._num_layers = len(counters.hits)
        self._is_on = False
        """The decision that holds between probes."""
        self._layer_on = np.ones(self._num_layers, np.bool_)
        self._was_off = np.zeros(self._num_layers, np.bool_)
        self._probe_step = 0
        """Steps into the probe; negative: steps until the next one, counted upwards."""
        self._hold_steps = FIRST_HOLD_STEPS
        self._seconds: dict[tuple[int, bool], list[float]] = defaultdict(list)
        """(size class of the step, with prefetching) -> times."""
        self._num_tokens = 0
        self._started_s: float | None = None
        self._before = self._brought()
        self._useful_before = self._useful()
        """Of use before the probe."""
        self.last_ratio: float | None = None
        """Time of a step with prefetching over one without, in the last probe."""
        self._publish()

    # ---- one step ---------------------------------------------------------------------------------

    def begin(self, num_tokens: int) -> None:
        """A step of `num_tokens` tokens reaches the first layer."""
        self._num_tokens = num_tokens
        self._started_s = self._clock()

    def end(self) -> None:
        """The step has left the last layer."""
        if self._started_s is None:
            return
        seconds, self._started_s = self._clock() - self._started_s, None
        if self._probe_step >= 0:
            if self._probe_step % BLOCK_STEPS:
                self._seconds[self._num_tokens.bit_length(), self.is_prefetching].append(seconds)
            self._probe_step += 1
            if self._probe_step % BLOCK_STEPS == 0:
                self._judge_layers()
            if self._probe_step == PROBE_BLOCKS * BLOCK_STEPS:
                self._decide()
        else:
            self._probe_step += 1
            if self._probe_step % FIRST_HOLD_STEPS == 0:
                self._judge_layers()
            if self._probe_step == 0:
                self._begin_probe()
        self._publish()

    @property
    def is_prefetching(self) -> bool:
        """Whether this step may prefetch at all."""
        return self._is_on if self._probe_step < 0 else self._probe_step // BLOCK_STEPS % 2 == 1

    def allowed(self, advice: Sequence[Advice]) -> list[Advice]:
        """The part of the advice that may be prefetched now."""
        return [item for item in advice if self._layer_on[item.layer]]

    # ---- decisions --------------------------------------------------------------------------------

    def _begin_probe(self) -> None:
        self._seconds.clear()
        self._was_off = ~self._layer_on
        self._layer_on[:] = True
        self._before = self._brought()
        self._useful_before = self._useful()

    def _decide(self) -> None:
        """After a probe: on or off, and until when."""
        self.last_ratio = self._ratio()
        was_on = self._is_on
        if self.last_ratio is not None:
            self._is_on = self.last_ratio < 1.0 if was_on else self.last_ratio < TURN_ON_RATIO and self._is_clear()
        is_settled = self._is_on == was_on
        self._hold_steps = min(2 * self._hold_steps, LONGEST_HOLD_STEPS) if is_settled else FIRST_HOLD_STEPS
        self._probe_step = -self._hold_steps

    def _ratio(self) -> float | None:
        """Medians with prefetching over medians without, over the size classes that were seen in both ways."""
        sizes = {size for size, on in self._seconds if (size, not on) in self._seconds}
        if not sizes:
            return None
        with_it, without = (sum(self._typical_s(size, on) for size in sizes) for on in (True, False))
        return with_it / without if without > 0 else None

    def _typical_s(self, size: int, on: bool) -> float:
        """The median step, times as often as it was seen in both ways."""
        times = self._seconds
        return statistics.median(times[size, on]) * min(len(times[size, True]), len(times[size, False]))

    def _is_clear(self) -> bool:
        """Of two steps, one with prefetching and one without, the one with it was faster nearly always, ties half: the
        rank-sum test, which a busy machine's outliers do not fool. And something was of use at all."""
        pairs = [
            (with_s, without_s)
            for (size, on), times in self._seconds.items()
            if on
            for with_s in times
            for without_s in self._seconds.get((size, False), ())
        ]
        faster = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs)
        return faster >= CLEARLY_FASTER_FRAC * len(pairs) and self._useful() > self._useful_before

    def _judge_layers(self) -> None:
        """Leave out layers whose guesses were mostly wasted, of those with enough evidence."""
        useful, wasted = self._brought() - self._before
        for layer in np.flatnonzero(useful + wasted >= FEWEST_EXPERTS):
            bar = TURN_ON_USEFUL_FRAC if self._was_off[layer] else TURN_OFF_USEFUL_FRAC
            self._layer_on[layer] = useful[layer] >= bar * (useful[layer] + wasted[layer])
            self._before[:, layer] += useful[layer], wasted[layer]

    def _brought(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """[2, L] experts brought ahead of time so far: of use, and wasted."""
        counters = self._counters
        useful = counters.prefetch_hits + counters.late_prefetches
        return np.stack([useful.astype(np.float64), counters.wasted_bytes / self._expert_bytes])

    def _useful(self) -> int:
        """Experts brought ahead of time that were of use, over all layers."""
        return int(self._counters.prefetch_hits.sum() + self._counters.late_prefetches.sum())

    def _publish(self) -> None:
        self._counters.prefetch_on[:] = self._layer_on & self.is_prefetching
