"""Crossover: bring a missing expert to the device, or compute it where it is, on the host?

An expert's bytes take the same time over the link however many tokens want it; the CPU's time grows with the tokens.
Both are measured at start-up, on this machine and this model, since constants of other machines are wrong by ten times
(Fiddler's 10 tokens, ik_llama's 32, ktransformers' 4 to 512). Link and CPU work at the same time, so what counts is
when the later of the two is done (HybriMoE), not the sum (Fiddler).
Knows times and token counts; knows no experts, no devices and no policy.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

TOKEN_COUNTS = (1, 4, 16, 64)
"""Tokens of one expert at which the CPU is timed."""
REPEATS = 3


@dataclass(frozen=True, slots=True)
class MissCosts:
    """Seconds that one expert takes either way."""

    copy_s: float
    """Until its bytes are on the device."""
    tokens: tuple[int, ...]
    """Ascending, at least two."""
    host_s: tuple[float, ...]
    """Seconds of the CPU's kernel for each number in `tokens`."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.host_s) >= 2
        assert all(a < b for a, b in pairwise(self.tokens))

    def host(self, tokens: int) -> float:
        """Seconds of the CPU for one expert of `tokens` tokens: linear between the measured points, and beyond them."""
        right = min(max(bisect_right(self.tokens, tokens), 1), len(self.tokens) - 1)
        x0, x1 = self.tokens[right - 1], self.tokens[right]
        y0, y1 = self.host_s[right - 1], self.host_s[right]
        return max(0.0, y0 + (y1 - y0) * (tokens - x0) / (x1 - x0))

    @property
    def crossover_tokens(self) -> int:
        """Tokens of a single missing expert up to which the CPU is at least as fast as the link; 0: never."""
        if self.host(1) > self.copy_s:
            return 0
        tokens = 1
        while tokens < 1 << 20 and self.host(2 * tokens) <= self.copy_s:
            tokens *= 2
        return max(t for t in range(tokens, 2 * tokens + 1) if self.host(t) <= self.copy_s)


def cheapest_on_host(counts: Sequence[int], costs: MissCosts, num_coming: int = 0) -> list[int]:
    """Which of a layer's missing experts the CPU should take, so that all are done soonest: positions in `counts`.

    `counts`: tokens of each missing expert; `num_coming`: experts that are on the link already. Those of fewest tokens
    go to the CPU, and of equally good splits the one with the least work for it.
    """
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    host_s = accumulate((costs.host(counts[i]) for i in order), initial=0.0)
    finished_s = [max(s, (num_coming + len(counts) - n) * costs.copy_s) for n, s in enumerate(host_s)]
    return sorted(order[: finished_s.index(min(finished_s))])


def calibrate(
    bring: Callable[[int], None],
    run_on_host: Callable[[int, int], None],
    clock: Callable[[], float] = time.perf_counter,
) -> MissCosts:
    """Time both ways. `bring(i)`: one expert to the device, until it is there; `run_on_host(i, tokens)`: one on the
    CPU. `i` counts up, so that each call can take another expert and no cache helps; the first calls are not timed."""
    counter = iter(range(1 << 30))

    def best_s(call: Callable[[int], None]) -> float:
        times = []
        for _ in range(REPEATS + 1):
            number, start = next(counter), clock()
            call(number)
            times.append(clock() - start)
        return min(times[1:])

    copy_s = best_s(bring)
    host_s = tuple(best_s(lambda i, t=tokens: run_on_host(i, t)) for tokens in TOKEN_COUNTS)  # type: ignore[misc]
    return MissCosts(copy_s, TOKEN_COUNTS, host_s)
