"""Speculator: the Drafter of an engine. It guesses by prompt lookup, as much as the trial allows.

Knows plans and sequences; knows no model. Its decisions change how many steps an answer takes and never a token.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_serve.config import SpeculationConfig
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve.scheduling.sequence import Sequence
from moe_serve.speculation.acceptance import Acceptance
from moe_serve.speculation.prompt_lookup import NO_GUESS, Guess, PromptLookup
from moe_serve.speculation.trial import Offer, Trial


class Speculator:
    """One engine's drafts. Without a trial every guess is checked."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config
        self._trial = Trial() if config.trial else None
        self._acceptance = Acceptance()
        self._lookups: dict[Sequence, PromptLookup] = {}
        self._matches: dict[Sequence, int] = {}
        """Of the step under way: the length of the match behind each sequence's drafts."""
        self._forget_at = 64

    def draft(self, decoding: list[Sequence], num_tokens: int, room: int) -> Mapping[Sequence, tuple[int, ...]]:
        """See Drafter. Under a trial, only steps that just decode are drafted for: others are not timed."""
        self._matches.clear()
        if self._trial is not None and num_tokens != len(decoding):
            return {}
        guesses = {seq: guess for seq in decoding if (guess := self._guess(seq)).tokens}
        if not guesses:
            return {}
        drafts = {
            seq: guess.tokens[:length]
            for (seq, guess), length in zip(guesses.items(), self._lengths(decoding, guesses, room), strict=True)
            if length
        }
        self._matches.update({seq: guesses[seq].match for seq in drafts})
        return drafts

    def learn(self, plan: BatchPlan, seconds: float) -> None:
        """A step has been booked that took `seconds`."""
        for item in plan.scheduled:
            if item.drafts and item.seq in self._matches:
                num_right = max(0, item.seq.num_new - 1)
                self._acceptance.learn(item.seq, self._matches[item.seq], len(item.drafts), num_right)
        if self._trial is not None and all(item.is_decoding for item in plan.scheduled):
            num_new = sum(item.seq.num_new for item in plan.scheduled)
            self._trial.learn(len(plan.scheduled), plan.num_drafts, num_new, seconds)
        self._forget_finished()

    def _guess(self, seq: Sequence) -> Guess:
        config = self._config
        most = min(config.num_tokens, seq.max_total_tokens - seq.num_tokens - 1)
        if most < 1:
            return NO_GUESS
        lookup = self._lookups.get(seq)
        if lookup is None:
            lookup = self._lookups[seq] = PromptLookup(config.lookup_min, config.lookup_max)
        return lookup.guess(seq.token_ids, most)

    def _lengths(self, decoding: list[Sequence], guesses: Mapping[Sequence, Guess], room: int) -> list[int]:
        """Tokens to draft of each guess, at most `room` in all."""
        if self._trial is None:
            return _in_turn([len(guess.tokens) for guess in guesses.values()], room)
        offers = [Offer(len(guess.tokens), self._acceptance.chance(seq, guess.match)) for seq, guess in guesses.items()]
        return self._trial.lengths(len(decoding), offers, room)

    def _forget_finished(self) -> None:
        """Now and then: what is known of ended sequences."""
        if len(self._lookups) > self._forget_at:
            for seq in [s for s in self._lookups if s.is_finished]:
                del self._lookups[seq]
            self._acceptance.forget_finished()
            self._forget_at = 2 * len(self._lookups) + 64


def _in_turn(wanted: list[int], room: int) -> list[int]:
    """As much as is wanted, the first ones first."""
    given = []
    for length in wanted:
        given.append(min(length, room))
        room -= given[-1]
    return given
