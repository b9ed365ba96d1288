"""Finding and loading the compiled kernels, once per process.

Knows file names only. A missing library is normal (no compiler at install time): callers ask
`load()` and take their torch path when it returns None.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

log = logging.getLogger(__name__)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None with a log line that says what that costs."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    for path in found:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            log.warning("%s cannot be loaded (%s)", path, error)
    log.warning("C++ kernels are not built (no compiler at install time?): decoding on CPU will be slower")
    return None
