"""Units of memory."""

from __future__ import annotations

MIB = 1 << 20
"""Bytes in a MiB."""
