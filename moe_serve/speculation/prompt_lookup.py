"""PromptLookup: what may come next, from what followed the same tokens earlier in the prompt or the answer.

Answers that repeat their input (edits of code, quotations, summaries) are guessed well, and nothing has to be trained
or loaded (Saxena, Prompt Lookup Decoding, 2023). Host integers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MOST_PLACES = 16
"""Earlier places that are compared for the longest equal beginning: the newest ones."""


class Guess(NamedTuple):
    """Tokens that may come next."""

    tokens: tuple[int, ...]
    match: int
    """Tokens before them that stood there too, as far as they were compared."""


NO_GUESS = Guess((), 0)


class PromptLookup:
    """One sequence's tokens by the n-grams that they end with; it grows as the sequence does."""

    def __init__(self, shortest: int, longest: int) -> None:
        """A guess follows at least `shortest` equal tokens; up to `longest` are compared."""
        self._shortest = shortest
        self._longest = longest
        self._last: dict[tuple[int, ...], int] = {}
        """n-gram of `shortest` tokens -> where it stood last: the place of its last token."""
        self._before: dict[int, int] = {}
        """Such a place -> the one before it with the same n-gram."""
        self._num_known = shortest - 1

    def guess(self, tokens: Sequence[int], most: int) -> Guess:
        """At most `most` tokens that may follow `tokens`, which begin with those of the last call."""
        self._learn(tokens)
        end, match = self._best(tokens)
        if not match or most < 1:
            return NO_GUESS
        found: list[int] = list(tokens[end + 1 : end + 1 + most])
        period = len(found)
        while len(found) < most:  # the place is near the end: what repeats goes on repeating
            found.append(found[len(found) - period])
        return Guess(tuple(found), match)

    def _learn(self, tokens: Sequence[int]) -> None:
        """Note all n-grams but the one at the very end, which has no token behind it."""
        size = self._shortest
        for end in range(self._num_known, len(tokens) - 1):
            gram = tuple(tokens[end - size + 1 : end + 1])
            before = self._last.get(gram)
            if before is not None:
                self._before[end] = before
            self._last[gram] = end
        self._num_known = max(self._num_known, len(tokens) - 1)

    def _best(self, tokens: Sequence[int]) -> tuple[int, int]:
        """(place, equal tokens) of the longest equal beginning, the newest of equals; (0, 0): there is none."""
        best = (0, 0)
        place = self._last.get(tuple(tokens[-self._shortest :]))
        for _ in range(MOST_PLACES):
            if place is None or best[1] == self._longest:
                break
            match = self._equal(tokens, place)
            if match > best[1]:
                best = (place, match)
            place = self._before.get(place)
        return best

    def _equal(self, tokens: Sequence[int], place: int) -> int:
        """Tokens that stand before and at `place` as at the end, at most `longest`."""
        last = len(tokens) - 1
        match = self._shortest
        while match < self._longest and match <= place and tokens[place - match] == tokens[last - match]:
            match += 1
        return match
