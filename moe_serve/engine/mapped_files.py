"""MappedFiles: notices that a mapped checkpoint file was written to, before a step touches it.

A page beyond the end of a truncated file ends the process with SIGBUS, and bytes of a changed file are not the model's.
A file that changes during a step is not noticed in time; the supervisor starts the server again then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.errors import ExpertReadError
from moe_serve.errors import CheckpointChangedError

PERIOD_S_PER_FILE = 0.001
"""Time between two checks, for each file. A check takes 2 to 3 us per file, so it costs 0.3 % of the time."""


class MappedFiles:
    """Files in use, as they were when this was made."""

    def __init__(self, files: Iterable[Path] = ()) -> None:
        """ExpertReadError: a file cannot be opened."""
        self._files = [DirectFile(file, direct=False) for file in files]
        self._next_check_s = 0.0

    def check(self) -> None:
        """CheckpointChangedError if a file was written to; DirectFile.check_unchanged says what counts as that."""
        if not self._files or (now := time.monotonic()) < self._next_check_s:
            return
        self._next_check_s = now + PERIOD_S_PER_FILE * len(self._files)
        for file in self._files:
            try:
                file.check_unchanged()
            except ExpertReadError as error:
                raise CheckpointChangedError(error.message) from None

    def close(self) -> None:
        """The files are of no use any more."""
        for file in self._files:
            file.close()
        self._files.clear()
