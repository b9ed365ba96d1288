"""Prompts from a file: .txt, one per line; .json and .jsonl, objects with a text under a usual name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_serve.errors import ConfigError

FIELDS = ("prompt", "question", "text", "turns", "conversations")
"""The first of these that an object has: a string, or a list whose first element is one, or holds one as `value`."""


def read_prompts(path: Path, num_prompts: int | None = None) -> list[str]:
    """At most `num_prompts`, in the file's order. ConfigError names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: cannot read {path}: {error}") from error
    if path.suffix not in (".json", ".jsonl"):
        found = [line for line in text.splitlines() if line.strip()]
    else:
        found = [_text(row, path, number) for number, row in enumerate(_rows(text, path), start=1)]
    if not found:
        raise ConfigError(f"--prompts: {path} holds no prompt")
    return found[:num_prompts]


def _rows(text: str, path: Path) -> list[Any]:
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--prompts: {path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ConfigError(f"--prompts: {path} holds no list")
    return rows


def _text(row: Any, path: Path, number: int) -> str:
    value = next((row[name] for name in FIELDS if name in row), None) if isinstance(row, Mapping) else row
    if isinstance(value, list) and value:
        value = value[0].get("value") if isinstance(value[0], Mapping) else value[0]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"--prompts: entry {number} of {path} has no text; give one under {', '.join(FIELDS)}")
    return value
