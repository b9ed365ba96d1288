"""StepReader: a rank's side of a step: messages as plans over mirrored sequences. Knows messages; knows no model."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from moe_serve.parallel.modes.runner import RankStep
from moe_serve.parallel.wire.messages import NewSequence, Step
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.sequence import Closeable, GrammarSpec, Request, Sequence


class Startable(Closeable, Protocol):
    """What follows a grammar for a sequence."""

    def begin(self) -> bool: ...


@dataclass
class StepReader:
    """Keeps a mirror of every live sequence."""

    start_grammar: Callable[[GrammarSpec], Startable]
    """Makes the matcher of a sequence with a grammar."""
    _sequences: dict[int, Sequence] = field(default_factory=dict)

    def read(self, message: Step) -> RankStep:
        for key in message.gone:
            gone = self._sequences.pop(key)
            if gone.matcher is not None:
                gone.matcher.close()
        for entry in message.new:
            seq = self._sequences[entry.key] = _mirror(entry)
            if seq.params.grammar is not None:
                matcher = seq.matcher = self.start_grammar(seq.params.grammar)
                matcher.begin()  # it may be compiled while the prompt is computed
        scheduled = []
        for item in message.items:
            seq = self._sequences[item.key]
            seq.token_ids += item.fresh
            seq.page_ids = array("q", item.pages)
            seq.num_computed = item.start
            scheduled.append(ScheduledSequence(seq, item.start, item.count))
        homes = tuple(item.seq.home_rank for item in scheduled)
        return RankStep(BatchPlan(tuple(scheduled)), homes, message.routes)


def _mirror(entry: NewSequence) -> Sequence:
    request = Request(entry.request_id, tuple(entry.tokens[: entry.num_prompt]), entry.params)
    seq = Sequence(request, entry.index, entry.tokens, entry.max_total_tokens)
    seq.home_rank = entry.home
    return seq
