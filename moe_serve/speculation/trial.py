"""Trial: how many tokens to guess for each sequence, so that a step gives the most tokens per second.

A step without drafts gives one token per sequence. Drafts give more and make it longer; how likely they are right and
how much longer it is are both measured on live steps (acceptance.py, step_times.py). The best number may be none.

What was measured may be wrong or out of date. So an account holds the seconds that drafting has gained over steps
without it. Overdrawn, nothing is drafted. Plain steps pay a hundredth of their time into it: that is what trying out
may cost, and the bound of what drafting may lose. Between drafted steps some plain ones are timed. Knows no tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_serve.speculation.step_times import StepTimes, size_class

CLEAR_GAIN = 1.03
"""Expected tokens per second over those of a plain step, from which on it is worth it."""
TRIAL_FRAC = 0.01
"""Of the time of plain steps, for trying out what is expected to lose."""
FIRST_STEPS = 6.0
"""Plain steps' time in the account at first."""
MOST_STEPS = 12.0
"""Plain steps' time that the account holds at most: what was gained long ago pays for no loss of today."""
DRAFTED_RUN = 64
"""Drafted steps after which some plain ones are timed again."""
PLAIN_RUN = 3
"""The first of them is not timed: a cache of experts still shows the drafts."""
OUTLIER = 2.0
"""A drafted step counts as at most this many times the expected time: hiccups hit plain steps too."""
MOST_SEQS = 64
"""Sequences in a step beyond which there is nothing to gain: weights are used by many tokens already."""


class Offer(NamedTuple):
    """Guesses about one sequence."""

    num_tokens: int
    chance: float
    """That each is right, if those before it are."""


class Trial:
    """Asked before each step, told after it."""

    def __init__(self) -> None:
        self._times = StepTimes()
        self._account_s: float | None = None
        self._num_drafted = 0
        """Steps drafted since plain ones were timed."""
        self._plain_left = 0
        """Plain steps to go before anything is drafted again."""
        self._was_drafted = False

    def lengths(self, num_seqs: int, offers: list[Offer], room: int) -> list[int]:
        """Tokens to draft of each offer in a step of `num_seqs` sequences, at most `room` in all."""
        none = [0] * len(offers)
        plain_s = self._times.plain_s(num_seqs)
        if plain_s is None or num_seqs > MOST_SEQS or self._is_plain_turn() or self._account(plain_s) < 0:
            return none
        order = _most_likely_first(offers)[:room]
        number, gain = self._best(num_seqs, [chance for chance, _ in order])
        if gain < CLEAR_GAIN and not self._may_try(num_seqs, number, gain, plain_s):
            return none
        for _, index in order[:number]:
            none[index] += 1
        return none

    def learn(self, num_seqs: int, num_drafts: int, num_tokens: int, seconds: float) -> None:
        """A step of sequences that all decode has given `num_tokens` tokens."""
        if num_drafts == 0:
            self._learn_plain(num_seqs, seconds)
            return
        self._was_drafted = True
        self._num_drafted += 1
        plain_s = self._times.plain_s(num_seqs)
        if plain_s is None:
            return
        seconds = min(seconds, OUTLIER * plain_s * self._times.ratio(num_seqs, num_drafts))
        self._times.add_drafted(num_seqs, num_drafts, seconds)
        self._pay(plain_s * num_tokens / num_seqs - seconds, plain_s)

    def _learn_plain(self, num_seqs: int, seconds: float) -> None:
        self._plain_left = max(0, self._plain_left - 1)
        if not self._was_drafted:
            self._times.add_plain(num_seqs, seconds)
        self._was_drafted = False
        plain_s = self._times.plain_s(num_seqs)
        if plain_s is not None:
            self._pay(TRIAL_FRAC * plain_s, plain_s)

    def _is_plain_turn(self) -> bool:
        if self._num_drafted >= DRAFTED_RUN:
            self._num_drafted, self._plain_left = 0, PLAIN_RUN
        return self._plain_left > 0

    def _account(self, plain_s: float) -> float:
        if self._account_s is None:
            self._account_s = FIRST_STEPS * plain_s
        return self._account_s

    def _pay(self, seconds: float, plain_s: float) -> None:
        self._account_s = min(self._account(plain_s) + seconds, MOST_STEPS * plain_s)

    def _best(self, num_seqs: int, chances: list[float]) -> tuple[int, float]:
        """(drafts, tokens per second over those of a plain step): how many of the most likely drafts give the most."""
        best = (0, 0.0)
        tokens = float(num_seqs)
        for number, chance in enumerate(chances, start=1):
            tokens += chance
            if size_class(number) != number:
                continue
            gain = tokens / num_seqs / self._times.ratio(num_seqs, number)
            if gain > best[1]:
                best = (number, gain)
        return best

    def _may_try(self, num_seqs: int, number: int, gain: float, plain_s: float) -> bool:
        """The account covers what a step that is expected to lose may lose at most."""
        return gain > 0 and self._account(plain_s) > (self._times.ratio(num_seqs, number) - 1) * plain_s


def _most_likely_first(offers: list[Offer]) -> list[tuple[float, int]]:
    """(chance that it gives a token, index of its offer) for each draft of all offers."""
    found = [
        (offer.chance**depth, index) for index, offer in enumerate(offers) for depth in range(1, offer.num_tokens + 1)
    ]
    return sorted(found, key=lambda pair: -pair[0])
