"""Trouble: why an engine that lives cannot serve now, for /health and for what starts the process again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trouble:
    """`status` is one word, `message` a sentence for a person."""

    status: str
    message: str
    is_final: bool
    """It will not serve again by itself."""
