"""White space in JSON that a model writes within a grammar."""

from __future__ import annotations

JSON_WHITESPACE = r"\n?[ ]{0,16}"
"""Between two JSON tokens at most a line break and its indentation: a model cannot lose itself in spaces."""
