"""Recorded arrivals: Azure's LLM inference traces (csv) and Mooncake's (jsonl).

Both give an arrival time, a prompt length and an answer length per request, in tokens. Mooncake
adds `hash_ids`: one id per block of 512 prompt tokens, equal where two prompts share a prefix.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from moe_serve.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One recorded request."""

    arrival_s: float
    """Since the first request of the trace."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int) -> list[TraceEntry]:
    """The first `limit` requests; the format goes by the file's suffix. ConfigError names a bad line."""
    readers = {".csv": _azure_rows, ".jsonl": _mooncake_rows}
    if path.suffix not in readers:
        raise ConfigError(f"--dataset-path: {path} is neither .csv (Azure) nor .jsonl (Mooncake)")
    try:
        with path.open(encoding="utf-8") as file:
            entries = list(islice(readers[path.suffix](file), limit))
    except OSError as error:
        raise ConfigError(f"--dataset-path: cannot read {path}: {error.strerror}") from error
    if not entries:
        raise ConfigError(f"--dataset-path: {path} holds no request")
    return _from_zero(entries)


def _azure_rows(file: Any) -> Iterator[TraceEntry]:
    for number, row in enumerate(csv.DictReader(file), start=2):
        try:
            arrival_s = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            yield TraceEntry(arrival_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"--dataset-path: line {number} is not an Azure trace row: {error}") from error


def _mooncake_rows(file: Any) -> Iterator[TraceEntry]:
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line)
            ids = tuple(int(i) for i in row.get("hash_ids", ()))
            yield TraceEntry(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), ids)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"--dataset-path: line {number} is not a Mooncake trace row: {error}") from error


def _from_zero(entries: list[TraceEntry]) -> list[TraceEntry]:
    """Sorted by arrival, the first at 0."""
    ordered = sorted(entries, key=lambda e: e.arrival_s)
    start = ordered[0].arrival_s
    return [TraceEntry(e.arrival_s - start, e.input_tokens, e.output_tokens, e.hash_ids) for e in ordered]
