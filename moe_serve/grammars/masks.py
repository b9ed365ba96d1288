"""The masks of one step: the tokens that grammars allow, computed in their processes while the model runs.

A step waits for a mask a moment only: a row whose mask comes later goes without a token, and others go on. Shape
alphabet: R rows (sequences with a grammar in this step), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_serve.grammars.grammar_process import GrammarProcess, ProcessEndedError
from moe_serve.grammars.matcher import GrammarError, Matcher
from moe_serve.scheduling.batch_plan import Blame, StepError
from moe_serve.scheduling.sequence import Sequence

WAIT_S = 0.03
"""For masks just asked for, which take milliseconds."""
LATE_WAIT_S = 0.005
"""In all for what was late in the step before: every such step holds the other rows up."""


@dataclass(frozen=True, slots=True)
class Masks:
    """The tokens that the grammars of one step allow."""

    rows: list[int]
    """[R] rows of the logits that are constrained."""
    bits: NDArray[np.int32]
    """[R, >= V / 32], bit `t % 32` of word `t // 32` set when token t may come next."""
    errors: dict[Sequence, StepError]
    """Sequences whose grammar gave up; their rows are left out."""
    late: frozenset[Sequence] = frozenset()
    """Sequences whose mask is not there yet; their rows are left out too."""


class MaskThread:
    """Asks the processes beside the forward pass: waiting for them needs no GIL."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._pool = ThreadPoolExecutor(1, "moe-serve-masks")

    def start(self, seqs: Rows[Sequence]) -> Future[Masks] | None:
        """Begin with the masks of those rows of `seqs` that have a grammar; None when there are none."""
        rows = [i for i, s in enumerate(seqs) if s.matcher is not None]
        return self._pool.submit(compute_masks, seqs, rows, self._num_words) if rows else None

    def close(self) -> None:
        self._pool.shutdown()


def compute_masks(seqs: Rows[Sequence], rows: list[int], num_words: int) -> Masks:
    """Masks of `seqs[i]` for i in `rows`, each `num_words` words of 32 tokens."""
    step = _Step(seqs, num_words)
    ready = [i for i in rows if _matcher(seqs[i]).begin()]
    # Processes work side by side: all are asked before the first is heard, and before a late one is waited for.
    groups = step.ask(ready)
    groups += step.ask([i for i in rows if i not in ready and step.finds_process(i)])
    heard = [step.hear(process, members) for process, members in groups]
    return step.masks(heard)


@dataclass
class _Step:
    """The rows of one step and what has gone wrong with some."""

    seqs: Rows[Sequence]
    num_words: int
    wrong: dict[int, StepError] = field(default_factory=dict)
    """By row."""
    late: set[int] = field(default_factory=set)
    """Rows."""
    late_until_s: float = field(default_factory=lambda: time.monotonic() + LATE_WAIT_S)

    def finds_process(self, row: int) -> bool:
        """Whether a row's grammar is compiled, or is in a moment."""
        if _matcher(self.seqs[row]).begin(self.late_until_s - time.monotonic()):
            return True
        self.late.add(row)
        return False

    def ask(self, rows: list[int]) -> list[tuple[GrammarProcess, list[int]]]:
        """Have processes begin: each with the rows that it works on, unless it still works on older ones."""
        groups: dict[GrammarProcess, list[int]] = {}
        for i in rows:
            try:
                groups.setdefault(_matcher(self.seqs[i]).process(), []).append(i)
            except GrammarError as error:
                self.wrong[i] = StepError(str(error), error.blame)
        return [(process, members) for process, members in groups.items() if self._has_begun(process, members)]

    def _has_begun(self, process: GrammarProcess, members: list[int]) -> bool:
        if process.asked:
            return True
        try:
            process.ask([_matcher(self.seqs[i]).next_row(self.seqs[i]) for i in members], self.num_words)
        except ProcessEndedError as error:
            self._give_up(members, error)
            return False
        return True

    def hear(self, process: GrammarProcess, members: list[int]) -> tuple[list[int], NDArray[np.int32]]:
        """(rows, their masks [rows, words]) of those members whose masks are there now."""
        asked = list(process.asked)
        bits = np.zeros((len(asked), self.num_words), np.int32)
        try:
            until_s = max(process.asked_s + WAIT_S, self.late_until_s)
            if not process.has_answered(until_s - time.monotonic()):
                self.late.update(members)
                return [], bits[:0]
            errors = process.hear(bits)
        except ProcessEndedError as error:
            self._give_up(members, error)
            return [], bits[:0]
        return self._sort(members, asked, bits, errors)

    def _sort(
        self, members: list[int], asked: list[int], bits: NDArray[np.int32], errors: dict[int, str]
    ) -> tuple[list[int], NDArray[np.int32]]:
        """What `hear` returns, of an answer about the matchers `asked`. One asked in an earlier step may know fewer."""
        place = {matcher: at for at, matcher in enumerate(asked)}
        found = {i: place[n] for i in members if (n := _matcher(self.seqs[i]).number) in place}
        self.late.update(i for i in members if i not in found)
        self.wrong |= {i: self._stuck(i, errors[at]) for i, at in found.items() if at in errors}
        rows = [i for i, at in found.items() if at not in errors]
        return rows, bits if len(rows) == len(asked) else bits[[found[i] for i in rows]]

    def masks(self, heard: list[tuple[list[int], NDArray[np.int32]]]) -> Masks:
        """All that was heard."""
        rows = [i for members, _ in heard for i in members]
        bits = [part for _, part in heard]
        return Masks(
            rows,
            bits[0] if len(bits) == 1 else np.concatenate([np.zeros((0, self.num_words), np.int32), *bits]),
            {self.seqs[i]: error for i, error in self.wrong.items()},
            frozenset(self.seqs[i] for i in self.late),
        )

    def _give_up(self, rows: list[int], error: ProcessEndedError) -> None:
        blame = Blame.GRAMMAR if error.is_grammars else Blame.LOAD
        self.wrong |= {i: self._stuck(i, str(error), blame) for i in rows}

    def _stuck(self, row: int, reason: str, blame: Blame = Blame.GRAMMAR) -> StepError:
        count = self.seqs[row].num_generated
        return StepError(f"the grammar could not be followed further than {count} tokens: {reason}", blame)


def _matcher(seq: Sequence) -> Matcher:
    assert isinstance(seq.matcher, Matcher)
    return seq.matcher
