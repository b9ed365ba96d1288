"""Prompts from a file: .txt, one per line; .json and .jsonl, objects with a text under a usual name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_serve.errors import ConfigError
from moe_serve.loadtest.datasets import read_rows

FIELDS = ("prompt", "question", "text", "turns", "conversations")
"""The first of these that an object has: a string, or a list whose first element is one, or holds one as `value`."""


def read_prompts(path: Path, num_prompts: int | None = None) -> list[str]:
    """At most `num_prompts`, in the file's order. ConfigError names the file and the line."""
    if path.suffix in (".json", ".jsonl"):
        rows = read_rows(path, "--prompts")
        found = [_text(row, path, number) for number, row in enumerate(rows, start=1)]
    else:
        found = _lines(path)
    if not found:
        raise ConfigError(f"--prompts: {path} holds no prompt")
    return found[:num_prompts]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: cannot read {path}: {error}") from error


def _text(row: Any, path: Path, number: int) -> str:
    value = next((row[name] for name in FIELDS if name in row), None) if isinstance(row, Mapping) else row
    if isinstance(value, list) and value:
        value = value[0].get("value") if isinstance(value[0], Mapping) else value[0]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"--prompts: entry {number} of {path} has no text; give one under {', '.join(FIELDS)}")
    return value
