"""What can go wrong with expert weights at run time. Knows no HTTP: moe_serve/errors.py translates."""

from __future__ import annotations


class ExpertReadError(Exception):
    """An expert's bytes could not be read, or are not the right ones.

    `message` names the tensor and the file and says what to do; it is safe to show to a client.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
