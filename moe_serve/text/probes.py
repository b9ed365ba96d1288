"""Texts that two readings of a vocabulary must cut alike: spaces, digits, scripts, code. Knows no tokenizer."""

from __future__ import annotations

PROBES = (
    "a",
    "Hello, world!",
    "  two  spaces\n\ttab",
    "1234 + 5.6",
    "naïve Füße 你好 👩",
    "def f(x):\n    return x",
    "中文English混合 HTTPServer's don'T",
)
