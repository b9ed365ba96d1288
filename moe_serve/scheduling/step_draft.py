"""StepDraft: a step's plan in the making, within the limits of one step. Host integers only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The bounds of one step, from EngineConfig."""

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    max_num_batched_seqs: int | None = None
    """Sequences that decode in one step; None: all that run."""
    max_scored_tokens: int = 512
    """Prompt tokens of one step whose log-probabilities are computed: each needs a row of logits, the vocabulary's
    size. Without chunked prefill a prompt is scored whole."""
    state_block: int | None = None
    """Tokens in a block of moe_serve/scheduling/prefixes.py; None: the model has no states."""
    num_saved_states: int = 0


class StepDraft:
    """A BatchPlan in the making: the budget left and what was decided so far."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.budget = limits.max_num_batched_tokens
        self.score_budget = max(limits.max_scored_tokens, limits.state_block or 0)
        self.scheduled: list[ScheduledSequence] = []
        self.preempted: list[Sequence] = []
        self.queried = 0
        self.hits = 0

    def add(self, item: ScheduledSequence) -> None:
        self.scheduled.append(item)
        self.budget -= item.count
        self.score_budget -= len(item.scored)

    def drop(self, seq: Sequence) -> None:
        """Take a just-scheduled sequence out again, because it was preempted."""
        for item in self.scheduled:
            if item.seq is seq:
                self.scheduled.remove(item)
                self.budget += item.count
                self.score_budget += len(item.scored)
                return

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.scheduled)

    @property
    def decoding(self) -> list[ScheduledSequence]:
        """Runs of one token that a new one is sampled behind."""
        return [item for item in self.scheduled if item.count == 1 and item.needs_sample]

    def add_drafts(self, seq: Sequence, tokens: tuple[int, ...]) -> None:
        """Have a decoding sequence compute these too."""
        place = next(i for i, item in enumerate(self.scheduled) if item.seq is seq)
        self.scheduled[place] = replace(self.scheduled[place], count=1 + len(tokens), drafts=tokens)
        self.budget -= len(tokens)
        self.score_budget -= len(tokens)

    def finish(self) -> BatchPlan:
        return BatchPlan(tuple(self.scheduled), tuple(self.preempted), self.queried, self.hits)
