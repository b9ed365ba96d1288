"""Matcher: how far one sample has come in its grammar. Knows its process; computes nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass

from moe_serve.errors import InvalidRequestError, MoEServeError, OverloadedError
from moe_serve.grammars.grammar_process import GrammarProcess
from moe_serve.scheduling.batch_plan import Blame
from moe_serve.scheduling.sequence import Sequence


class GrammarError(Exception):
    """A grammar that cannot be followed further; `blame` says why."""

    def __init__(self, message: str, blame: Blame) -> None:
        super().__init__(message)
        self.blame = blame


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

    def begin(self, wait_s: float = 0.0) -> bool:
        """Find the process, waiting for it as long; False if it is not there yet."""
        if self._place is None:
            self._place = self._find()
        if not self._place.done() and wait_s > 0:
            wait([self._place], wait_s)
        return self._place.done()

    def process(self) -> GrammarProcess:
        """The process to ask, once `begin` said that it is there. GrammarError: it could not be made."""
        try:
            return self._known_place().process
        except InvalidRequestError as error:
            raise GrammarError(error.message, Blame.GRAMMAR) from error
        except OverloadedError as error:
            raise GrammarError(error.message, Blame.LOAD) from error
        except MoEServeError as error:
            raise GrammarError(error.message, Blame.SERVER) from error
        except CancelledError as error:
            raise GrammarError("the sequence has ended", Blame.SERVER) from error

    @property
    def number(self) -> int:
        """In its process."""
        number = self._known_place().number
        assert number is not None
        return number

    def _known_place(self) -> Place:
        assert self._place is not None, "begin comes first"
        assert self._place.done(), "begin said that it is not there yet"
        return self._place.result()

    def next_row(self, seq: Sequence) -> tuple[int, list[int]]:
        """What to ask the process for: (matcher, tokens that are new to it)."""
        new = seq.token_ids[seq.num_prompt + self._num_consumed :]
        self._num_consumed += len(new)
        return self.number, new

    def close(self) -> None:
        """The sequence has ended."""
        place = self._place
        if place is None or place.cancel() or place.exception() is not None:
            return
        process, number = place.result().process, place.result().number
        if number is not None:
            process.forget(number)
