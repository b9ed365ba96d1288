"""What commands show: tables for people, one line of JSON for programs. Knows text only.

A table is rows of cells, the header first: the first column is aligned left, numbers right.

    policy   hits %
    lru       61.20
    belady    74.05
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "-"
"""A number that does not exist."""


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(line(row, widths, indent) for row in rows)


def line(cells: Sequence[str], widths: Sequence[int], indent: str = "") -> str:
    """One row, for tables that are shown while they grow."""
    first, *rest = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
    return (indent + "  ".join(padded)).rstrip()


def number(value: float, decimals: int = 2) -> str:
    return NONE if math.isnan(value) else f"{value:.{decimals}f}"


def add_json_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--json", action="store_true", help="End with one line of JSON, as when the output is no terminal."
    )


def print_json(args: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """One line of JSON, for a program that reads us or where the user asks for it."""
    if args.json or not sys.stdout.isatty():
        print(json.dumps(found), flush=True)
