"""Why a sequence ended, and what is reported of it then. Without numpy, so that `--help` stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a sequence ended, in the OpenAI API's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Ending(NamedTuple):
    """How a sequence ended."""

    reason: FinishReason
    stop_reason: int | str | None = None
    """The stop token id or stop string, if any."""


@dataclass(frozen=True, slots=True)
class FinishedStats:
    """One finished sample. All times in seconds."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int | None
    n: int
    e2e_s: float
    queue_s: float
    """Arrival to first scheduled."""
    prefill_s: float
    """First scheduled to first token."""
    decode_s: float
    """First to last token."""

    @property
    def time_to_first_token_s(self) -> float:
        return self.queue_s + self.prefill_s
