"""The masks of one step: the tokens that grammars allow, computed in their processes while the model runs.

Shape alphabet: R rows (sequences with a grammar in this step), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_serve.grammars.grammar_process import GrammarProcess, ProcessEndedError
from moe_serve.grammars.matcher import GrammarError, Matcher
from moe_serve.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Masks:
    """The tokens that the grammars of one step allow."""

    rows: list[int]
    """[R] rows of the logits that are constrained."""
    bits: NDArray[np.int32]
    """[R, >= V / 32], bit `t % 32` of word `t // 32` set when token t may come next."""
    errors: dict[Sequence, str]
    """Sequences whose grammar gave up; their rows are left out."""


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
    wrong: dict[int, str] = {}
    ready = [i for i in rows if _matcher(seqs[i]).begin()]
    late = [i for i in rows if i not in ready]
    # Processes work side by side: all are asked before the first is heard, and before a late one is waited for.
    asked = _ask(seqs, ready, num_words, wrong)
    asked += _ask(seqs, late, num_words, wrong)
    order = [i for _, members in asked for i in members]
    bits = np.zeros((len(order), num_words), np.int32)
    at = 0
    for process, members in asked:
        wrong |= _hear(process, members, bits[at : at + len(members)])
        at += len(members)
    if wrong:
        bits = bits[[i not in wrong for i in order]]
    errors = {seqs[i]: f"the grammar could not be followed further: {text}" for i, text in wrong.items()}
    return Masks([i for i in order if i not in wrong], bits, errors)


def _matcher(seq: Sequence) -> Matcher:
    assert isinstance(seq.matcher, Matcher)
    return seq.matcher


def _ask(
    seqs: Rows[Sequence], rows: list[int], num_words: int, wrong: dict[int, str]
) -> list[tuple[GrammarProcess, list[int]]]:
    """Have processes begin: each with the rows that it works on. Errors go to `wrong`, by row."""
    groups: dict[GrammarProcess, list[int]] = {}
    for i in rows:
        try:
            groups.setdefault(_matcher(seqs[i]).process(), []).append(i)
        except GrammarError as error:
            wrong[i] = str(error)
    asked = []
    for process, members in groups.items():
        try:
            process.ask([_matcher(seqs[i]).next_row(seqs[i]) for i in members], num_words)
            asked.append((process, members))
        except ProcessEndedError as error:
            wrong |= dict.fromkeys(members, str(error))
    return asked


def _hear(process: GrammarProcess, members: list[int], bits: NDArray[np.int32]) -> dict[int, str]:
    """Write the masks of one process's rows into `bits`; errors by row."""
    try:
        return {members[at]: text for at, text in process.hear(bits).items()}
    except ProcessEndedError as error:
        return dict.fromkeys(members, str(error))
