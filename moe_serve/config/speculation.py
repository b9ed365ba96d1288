"""SpeculationConfig: whether next tokens are guessed, from what, and how many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, changed_settings, option
from moe_serve.errors import ConfigError


@dataclass(frozen=True)
class SpeculationConfig(Settings):
    """Tokens are the same with and without it."""

    HEADING: ClassVar[str] = "Speculation"

    method: str = option(
        "off",
        "Guess next tokens and check several in one step. ngram: what followed the last tokens earlier in the prompt or"
        " the answer (prompt lookup). Tokens and log-probabilities are those without it.",
        ("off", "ngram"),
        flat="speculative_method",
    )
    num_tokens: int = option(
        8,
        "Most tokens guessed at a time for a sequence.",
        bound="positive",
        flat="num_speculative_tokens",
        aliases=("draft_max",),
    )
    lookup_min: int = option(
        3,
        "Fewest last tokens that must have stood together before.",
        bound="positive",
        flat="prompt_lookup_min",
        aliases=("ngram_prompt_lookup_min",),
    )
    lookup_max: int = option(
        8,
        "Most last tokens compared: of several places the one with the longest equal beginning is taken.",
        bound="positive",
        flat="prompt_lookup_max",
        aliases=("ngram_prompt_lookup_max",),
    )
    trial: bool = option(
        True,
        "Guess only as far as measured steps say that it is faster. Without it every guess is checked.",
        flat="speculative_trial",
    )

    @property
    def is_on(self) -> bool:
        return self.method != "off"

    def check(self) -> None:
        if self.lookup_min > self.lookup_max:
            raise ConfigError(
                f"--prompt-lookup-min ({self.lookup_min}) must not exceed --prompt-lookup-max ({self.lookup_max})"
            )

    def no_effect(self) -> str | None:
        given = changed_settings(self)
        if not self.is_on and given:
            return f"{next(iter(given.values())).flag} has no effect without --speculative-method"
        return None
