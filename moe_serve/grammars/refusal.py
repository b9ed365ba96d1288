"""What is wrong with a grammar. Imports nothing of ours, so that the compiler's process stays small."""

from __future__ import annotations


class RefusedError(Exception):
    """A grammar that cannot be followed; the message says what is wrong and where."""
