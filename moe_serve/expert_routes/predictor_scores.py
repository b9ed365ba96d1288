"""Predictors held against recorded routing: who is left out to test on, how much is recalled, what a cache gains.

Joins predictors/ (recall) with expert_cache/ (replay). Knows no models and prints nothing.

Shape alphabet: D lookaheads, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from expert_cache.policies import find_policy
from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import events_of
from expert_cache.simulation.replay import ReplayResult, replay_belady, replay_events, replay_forecasts
from moe_serve.errors import ConfigError, TraceFileError
from predictors.evaluation import Scores, evaluate, split_sequences
from predictors.methods import find_method, method_names
from predictors.predictor import HIDDEN, TOKEN_IDS, Foresight, Training
from predictors.trace import RoutingTrace, merge

POLICIES = ("lru", "lfru", "affinity")
BOUND = "belady"


@dataclass(frozen=True)
class Fold:
    """What is learnt from, and what is tested on."""

    train: RoutingTrace
    test: RoutingTrace


@dataclass
class Replayed:
    """Hits and uses, summed over folds."""

    hits: int = 0
    uses: int = 0
    tokens: int = 0

    def add(self, result: ReplayResult) -> None:
        self.hits += int(result.hits.sum())
        self.uses += int(result.hits.sum() + result.misses.sum())
        self.tokens += result.num_tokens

    @property
    def hit_frac(self) -> float:
        return self.hits / self.uses

    @property
    def misses_per_token(self) -> float:
        return (self.uses - self.hits) / self.tokens


@dataclass
class Report:
    """Everything that `evaluate` found."""

    scores: dict[str, Scores] = field(default_factory=dict)
    """By method."""
    replays: dict[float, dict[str, Replayed]] = field(default_factory=dict)
    """By capacity in percent, then by method or policy."""


def usable_methods(trace: RoutingTrace) -> list[str]:
    """Those that lack nothing which a trace can hold."""
    lacking = {HIDDEN} | ({TOKEN_IDS} if trace.token_ids is None else set())
    return [name for name in method_names() if not find_method(name).needs & lacking]


def folds_of(traces: Sequence[RoutingTrace], held_out: str, seed: int = 0) -> list[Fold]:
    """`sequence`: a fifth of all sequences is tested on; `task`: each trace in turn, learning from the others."""
    if held_out == "sequence":
        try:
            return [Fold(*split_sequences(merge(traces), seed=seed))]
        except ValueError as error:  # of another model, or of one sequence
            raise TraceFileError(str(error)) from None
    if len(traces) < 2:
        raise ConfigError("--held-out task needs two traces or more: each in turn is tested on, the others learnt from")
    return [Fold(merge([t for t in traces if t is not test]), test) for test in traces]


def judge(
    folds: Sequence[Fold], methods: Sequence[str], distances: Sequence[int], capacities: Sequence[float], seed: int = 0
) -> Iterator[tuple[str, Report]]:
    """(name, report so far) as each method or policy is done."""
    report = Report(replays={percent: {} for percent in capacities})
    for name in methods:
        for fold in folds:
            _judge_method(name, fold, distances, report, seed)
        yield name, report
    if not capacities:
        return
    for fold in folds:
        _replay_policies(fold.test, report)
    yield "policies", report


def _judge_method(name: str, fold: Fold, distances: Sequence[int], report: Report, seed: int) -> None:
    try:
        predictor = find_method(name).fit(Training(fold.train, seed=seed))
    except ValueError as error:
        raise ConfigError(f"--method {name}: {error}") from None
    found = evaluate(predictor, fold.test, distances)
    report.scores[name] = added(report.scores[name], found) if name in report.scores else found
    if not isinstance(predictor, Foresight):
        return
    for percent, by_name in report.replays.items():
        result = replay_forecasts(fold.test, predictor, slots_of(percent, fold.test))
        by_name.setdefault(name, Replayed()).add(result)


def _replay_policies(test: RoutingTrace, report: Report) -> None:
    events = events_of(test)
    for percent, by_name in report.replays.items():
        slots = slots_of(percent, test)
        for name in POLICIES:
            policy = find_policy(name)(test.num_layers, test.num_experts)
            by_name.setdefault(name, Replayed()).add(replay_events(events, policy, slots))
        by_name.setdefault(BOUND, Replayed()).add(replay_belady(events, slots))


def slots_of(percent: float, trace: RoutingTrace) -> Capacity:
    return Capacity.of_frac(percent / 100, trace.num_layers, trace.num_experts)


def added(one: Scores, two: Scores) -> Scores:
    """Counts of both."""
    counts: Mapping[str, np.ndarray] = {
        f.name: getattr(one, f.name) + getattr(two, f.name) for f in fields(Scores) if f.name != "distances"
    }
    return Scores(one.distances, **counts)
