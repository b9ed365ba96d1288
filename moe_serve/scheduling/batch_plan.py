"""What the scheduler decided for one step (BatchPlan) and what came of it (StepResult).

Host integers and numpy arrays only: no tensor, no torch. moe_serve/execution/forward_batch.py is the one place that
turns a plan into tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence, TokenLogprob


class SavedAt(NamedTuple):
    """A copy of a recurrent model's state to keep."""

    place: int
    """Tokens of the sequence that are in it."""
    row: int
    """Of moe_serve/scheduling/saved_states.py."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A run of one sequence's tokens to compute in this step.

    Example: prompt of 10 tokens, pages of 4, a first chunk of 8 computed before. Then
    start = 8, count = 2, needs_sample = True, and the pages hold positions 0-3, 4-7, 8-11.
    """

    seq: Sequence
    start: int
    """Position of the first token to compute; equals seq.num_computed when planned."""
    count: int
    """Tokens to compute, >= 1."""
    restored: int | None = None
    """Row of the saved state that the run goes on from; None: the sequence's own, or that of an empty sequence."""
    saves: tuple[SavedAt, ...] = ()
    """States to keep, in order of their places."""
    drafts: tuple[int, ...] = ()
    """Guesses of the tokens behind the sequence's own, computed as well: the last ones of `count`."""

    @property
    def end(self) -> int:
        """One past the last position computed; also the length of the context attended to."""
        return self.start + self.count

    @property
    def is_decoding(self) -> bool:
        """Each of its tokens is computed as the only one of its sequence: bits are those of a step without drafts."""
        return self.count == 1 + len(self.drafts)

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute, drafts included."""
        return [*self.seq.token_ids[self.start : self.end], *self.drafts]

    @property
    def num_kept(self) -> int:
        """Of a step that was booked: the tokens whose keys and values stay. Only rejected drafts do not."""
        return max(1, min(self.count, self.seq.num_tokens - 1 - self.start)) if self.drafts else self.count

    @property
    def needs_sample(self) -> bool:
        """True when this run reaches the last known token, so that a new one can be sampled."""
        return self.end - len(self.drafts) == self.seq.num_tokens

    @property
    def scored(self) -> range:
        """Positions of this run whose logits are wanted for the log-probability of the prompt token after them."""
        if not self.seq.num_unscored:
            return range(0)
        return range(max(self.start, len(self.seq.prompt_logprobs)), min(self.end, self.seq.num_prompt - 1))


@dataclass(frozen=True, slots=True)
class DraftedPosition:
    """A sequence as it is if some drafts are its next tokens: what a sampler has to know of it there."""

    seq: Sequence
    drafts: tuple[int, ...]

    @property
    def request(self) -> Request:
        return self.seq.request

    @property
    def params(self) -> SamplingParams:
        return self.seq.params

    @property
    def index(self) -> int:
        return self.seq.index

    @property
    def token_ids(self) -> list[int]:
        return [*self.seq.token_ids, *self.drafts]

    @property
    def output_token_ids(self) -> list[int]:
        return [*self.seq.output_token_ids, *self.drafts]

    @property
    def num_tokens(self) -> int:
        return self.seq.num_tokens + len(self.drafts)

    @property
    def num_generated(self) -> int:
        return self.seq.num_generated + len(self.drafts)


Position = Sequence | DraftedPosition
"""Where a token is sampled: behind a sequence, or behind some drafts of it."""
Sampled = tuple[int, TokenLogprob | None]
"""A token, and its log-probability if the request asked for it."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step's work, in the order the tokens lie in the batch: decodes first, then prefills."""

    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    """Sequences that lost their pages to make room; they wait and are recomputed later."""
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0

    @property
    def num_restored(self) -> int:
        """Sequences that go on from a saved state."""
        return sum(s.restored is not None for s in self.scheduled)

    @property
    def num_tokens(self) -> int:
        return sum(s.count for s in self.scheduled)

    @property
    def is_empty(self) -> bool:
        return not self.scheduled

    @property
    def num_drafts(self) -> int:
        return sum(len(s.drafts) for s in self.scheduled)

    def positions(self) -> list[Position]:
        """Where tokens are sampled, in plan order; those behind drafts follow their sequence."""
        found: list[Position] = []
        for item in self.scheduled:
            if item.needs_sample:
                found.append(item.seq)
                found += [DraftedPosition(item.seq, item.drafts[:end]) for end in range(1, len(item.drafts) + 1)]
        return found

    def spans(self) -> tuple[slice, ...]:
        """Each scheduled sequence's tokens, when those of all are counted in plan order."""
        ends = accumulate(s.count for s in self.scheduled)
        return tuple(slice(end - s.count, end) for s, end in zip(self.scheduled, ends, strict=True))


@dataclass(frozen=True, eq=False, slots=True)
class StepRoutes:
    """The experts of every token of a step; T tokens, L MoE layers, K choices."""

    ids: NDArray[np.integer[Any]]
    """[T, L, K], in the order of the batch."""
    weights: NDArray[np.floating[Any]] | None
    """[T, L, K] router weights, where they are kept."""
    rows: tuple[slice, ...]
    """Each scheduled sequence's rows, in plan order."""


class Blame(StrEnum):
    """Where the cause of a failed sequence lies."""

    SERVER = "server"
    """Weights, files or numbers: the request was good."""
    GRAMMAR = "grammar"
    """The request's own grammar: it reached a limit."""
    LOAD = "load"
    """The machine is short of something now; the same request may succeed later."""


@dataclass(frozen=True, slots=True)
class StepError:
    """Why a sequence ends without an answer."""

    message: str
    blame: Blame = Blame.SERVER


@dataclass(frozen=True, slots=True)
class StepResult:
    """One sampled token for each scheduled sequence with `needs_sample`, in plan order."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    """Aligned with token_ids; None where the request asked for none."""
    errors: Mapping[Sequence, StepError] = field(default_factory=dict)
    """Sequences whose results are worthless, and why."""
    routes: StepRoutes | None = None
    """Where the routers sent the tokens, if anyone wants to know."""
    prompt_logprobs: Mapping[Sequence, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    """For each sequence with scored positions in this step: of the tokens after them."""
    drafted: Mapping[Sequence, tuple[Sampled, ...]] = field(default_factory=dict)
    """What was sampled behind each draft of a sequence; a token counts if all drafts before it were sampled too."""
    late: frozenset[Sequence] = frozenset()
    """Sequences whose mask did not come in time: their sampled token does not count, and the next step samples anew."""
