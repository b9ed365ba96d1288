"""FinishReason: why a sequence ended."""

from __future__ import annotations

from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended, in the OpenAI API's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
