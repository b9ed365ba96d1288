"""Answered: what logs and traces read of an HTTP request that generated text. Endpoints leave it in its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moe_serve.scheduling.finish import FinishedStats
from moe_serve.scheduling.sequence import Request


class TokenCounts(Protocol):
    """Over all prompts and samples of one HTTP request."""

    @property
    def cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


class Answered(Protocol):
    """One HTTP request: what it asked of the engine and what became of it so far."""

    @property
    def requests(self) -> Sequence[Request]: ...
    @property
    def usage(self) -> TokenCounts: ...
    @property
    def ended(self) -> Sequence[FinishedStats]:
        """Times of the samples that have ended."""
        ...

    @property
    def error_type(self) -> str:
        """Of the error that came as an event, after the first byte of a stream."""
        ...
