"""What a user of the planner can get wrong, with the name of the field. The command line turns it into one line."""

from __future__ import annotations


class PlacementError(ValueError):
    """Bad input. The message opens with the field and ends with the fix."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
