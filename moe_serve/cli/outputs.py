"""What every command that writes a file does alike: the check before the work, and --force."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_serve.errors import ConfigError
from moe_serve_base.whole_files import refusal


def add_force_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--force", action="store_true", help="Replace output files that exist.")


def check_outputs(args: argparse.Namespace, **outputs: Path | None) -> None:
    """ConfigError for the first of `outputs` that could not be written, before any work. Keys are flags' names."""
    for name, path in outputs.items():
        problem = None if path is None else refusal(path, getattr(args, "force", False))
        if problem is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: {path} {problem}")
