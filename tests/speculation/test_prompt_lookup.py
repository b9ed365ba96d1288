"""Guesses by prompt lookup, against a search of the whole text."""

from __future__ import annotations

import random

import pytest

from moe_serve.config import EngineConfig, SpeculationConfig
from moe_serve.config.settings import refuse_no_effect
from moe_serve.errors import ConfigError
from moe_serve.speculation.prompt_lookup import NO_GUESS, Guess, PromptLookup


def by_search(tokens: list[int], shortest: int, longest: int, most: int) -> Guess:
    """The newest place with the longest equal beginning, looked for everywhere."""
    for match in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        suffix = tokens[len(tokens) - match :]
        for end in range(len(tokens) - 2, match - 2, -1):
            if tokens[end - match + 1 : end + 1] == suffix:
                found = tokens[end + 1 : end + 1 + most]
                period = len(found)
                while len(found) < most:
                    found.append(found[-period])
                return Guess(tuple(found), match)
    return NO_GUESS


def test_what_followed_last_time() -> None:
    lookup = PromptLookup(2, 4)
    assert lookup.guess([1, 2, 3, 4, 5, 1, 2], 3) == Guess((3, 4, 5), 2)
    assert lookup.guess([1, 2, 3, 4, 5, 1, 2, 9], 3) == NO_GUESS


def test_the_longest_match_wins_and_the_newest_of_equals() -> None:
    assert PromptLookup(1, 3).guess([7, 8, 1, 9, 8, 2, 7, 8], 1) == Guess((1,), 2)
    assert PromptLookup(1, 3).guess([8, 1, 8, 2, 8], 1) == Guess((2,), 1)


def test_what_repeats_goes_on_repeating() -> None:
    assert PromptLookup(2, 4).guess([1, 2, 1, 2, 1], 5) == Guess((2, 1, 2, 1, 2), 3)


@pytest.mark.parametrize("seed", range(5))
def test_against_a_search_as_the_text_grows(seed: int) -> None:
    rng = random.Random(seed)
    shortest = rng.randint(1, 3)
    longest = shortest + rng.randint(0, 4)
    lookup, tokens = PromptLookup(shortest, longest), [rng.randrange(20)]
    for _ in range(60):
        assert lookup.guess(tokens, 4) == by_search(tokens, shortest, longest, 4)
        tokens += [rng.randrange(20)] if rng.random() < 0.5 else tokens[-rng.randint(1, 9) :]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"--prompt-lookup-min \(9\) must not exceed --prompt-lookup-max \(8\)"):
        SpeculationConfig(lookup_min=9)
    with pytest.raises(ConfigError, match="--num-speculative-tokens has no effect without --speculative-method"):
        refuse_no_effect(EngineConfig.of(num_speculative_tokens=3))
    refuse_no_effect(EngineConfig.of(speculative_method="ngram", num_speculative_tokens=3))
