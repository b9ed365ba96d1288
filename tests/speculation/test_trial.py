"""The trial on machines and texts that are made up: it never loses more than 2 %, and it wins where it can."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moe_serve.speculation.trial import Offer, Trial

MOST = 8
Chances = Callable[[int], float]
"""Step -> the chance that a guess is right."""


class Machine:
    """A step of B sequences and d drafts takes (1 + cost * d / B) times a plain one, give or take some noise."""

    def __init__(self, cost: float, num_seqs: int = 1, noise: float = 0.1) -> None:
        self.cost = cost
        self.num_seqs = num_seqs
        self._noise = noise
        self._rng = random.Random(7)

    def seconds(self, num_drafts: int) -> tuple[float, float]:
        """Of the step, and of a plain one at that moment."""
        hiccup = 5.0 if self._rng.random() < 0.01 else 1.0
        plain = hiccup * (1 + self._noise * (2 * self._rng.random() - 1))
        return plain * (1 + self.cost * num_drafts / self.num_seqs), plain


def speed(machine: Machine, chance: Chances, num_steps: int = 2000, told: float | None = None) -> float:
    """Tokens per second over those of plain steps, from the first step on. `told`: the chance that the trial is told,
    if not the true one."""
    trial, rng = Trial(), random.Random(3)
    tokens, seconds, plain_seconds = 0, 0.0, 0.0
    for step in range(num_steps):
        offers = [Offer(MOST, chance(step) if told is None else told)] * machine.num_seqs
        lengths = trial.lengths(machine.num_seqs, offers, room=1000)
        new = 0
        for length in lengths:
            new += 1
            for _ in range(length):
                if rng.random() >= chance(step):
                    break
                new += 1
        took, plain = machine.seconds(sum(lengths))
        trial.learn(machine.num_seqs, sum(lengths), new, took)
        tokens, seconds, plain_seconds = tokens + new, seconds + took, plain_seconds + plain
    return tokens / seconds / (machine.num_seqs * num_steps / plain_seconds)


@pytest.mark.parametrize("num_seqs", [1, 6])
@pytest.mark.parametrize("cost", [0.1, 0.4, 1.5])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.9])
def test_it_loses_nothing(chance: float, cost: float, num_seqs: int) -> None:
    assert speed(Machine(cost, num_seqs), lambda step: chance) > 0.98


@pytest.mark.parametrize("cost", [0.4, 1.5])
def test_it_loses_nothing_when_chances_are_told_wrong(cost: float) -> None:
    assert speed(Machine(cost), lambda step: 0.1, told=0.95) > 0.98


def test_it_loses_nothing_when_texts_change() -> None:
    assert speed(Machine(0.6), lambda step: 0.95 if step // 200 % 2 else 0.0, told=0.7) > 0.98


@pytest.mark.parametrize(("chance", "cost", "at_least"), [(0.9, 0.1, 2.8), (0.9, 0.4, 1.45), (0.6, 0.1, 1.6)])
def test_it_wins_where_it_can(chance: float, cost: float, at_least: float) -> None:
    assert speed(Machine(cost), lambda step: chance) > at_least


def test_nothing_is_drafted_before_plain_steps_are_known() -> None:
    trial = Trial()
    for _ in range(4):
        assert trial.lengths(1, [Offer(4, 0.99)], 100) == [0]
        trial.learn(1, 0, 1, 1.0)
    assert trial.lengths(1, [Offer(4, 0.99)], 100) == [4]
    assert trial.lengths(1, [Offer(4, 0.99)], 2) == [2]


def test_the_likelier_sequence_gets_more() -> None:
    trial = Trial()
    for _ in range(4):
        trial.learn(2, 0, 2, 1.0)
    few, many = trial.lengths(2, [Offer(8, 0.2), Offer(8, 0.95)], 100)
    assert few < many == 8
