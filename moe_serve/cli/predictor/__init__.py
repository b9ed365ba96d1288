"""`moe-serve predictor train | evaluate`: forecasting which experts come next, one file of this folder each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moe_serve.cli.commands import add_commands

HELP = "Train and judge predictors of expert routing."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_commands(parser, __name__, __path__, argv)


def run(args: argparse.Namespace) -> int:
    raise AssertionError("a sub-command is required, so its own `run` is called")
