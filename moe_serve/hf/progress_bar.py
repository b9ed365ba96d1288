"""The bar that transformers draws while it loads. Knows no models."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def bar_only_on_terminals() -> Iterator[None]:
    """transformers draws a progress bar on stderr; in a log file it would be one long line."""
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(io.StringIO()):
            yield
