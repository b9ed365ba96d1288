"""Matcher: how far one sample has come in its grammar. Knows its process; computes nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

from moe_serve.errors import MoEServeError
from moe_serve.grammars.grammar_process import GrammarProcess
from moe_serve.scheduling.sequence import Sequence


class GrammarError(Exception):
    """A grammar that cannot be followed further."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a grammar is followed."""

    process: GrammarProcess
    number: int | None
    """Of the matcher there; None for a check, which follows nothing."""


class Matcher:
    """Catches up with the sampled tokens by itself. `close` it when the sequence has ended."""

    def __init__(self, find: Callable[[], Future[Place]], place: Place | None) -> None:
        """`find` is called when a mask is first wanted, unless `place` is known already."""
        self._find = find
        self._place: Future[Place] | None = None
        self._num_consumed = 0
        if place is not None:
            self._place = Future()
            self._place.set_result(place)

    def begin(self) -> bool:
        """Find the process; False if it has to be waited for."""
        if self._place is None:
            self._place = self._find()
        return self._place.done()

    def process(self) -> GrammarProcess:
        """The process to ask; waits for it. GrammarError: there is none."""
        assert self._place is not None, "begin comes first"
        try:
            return self._place.result().process
        except MoEServeError as error:
            raise GrammarError(error.message) from error
        except CancelledError as error:
            raise GrammarError("the sequence has ended") from error

    def next_row(self, seq: Sequence) -> tuple[int, list[int]]:
        """What to ask the process for: (matcher, tokens that are new to it)."""
        assert self._place is not None, "begin comes first"
        number = self._place.result().number
        assert number is not None
        new = seq.token_ids[seq.num_prompt + self._num_consumed :]
        self._num_consumed += len(new)
        return number, new

    def close(self) -> None:
        """The sequence has ended."""
        place = self._place
        if place is None or place.cancel() or place.exception() is not None:
            return
        process, number = place.result().process, place.result().number
        if number is not None:
            process.forget(number)
