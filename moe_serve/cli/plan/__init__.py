"""`moe-serve plan TRACE ...`, and `moe-serve plan compare | evaluate | migrate | watch ...`.

A first word that is a command's name is that command; anything else is a trace to plan for. A trace in a
file called `compare` is spelt `./compare`. numpy is imported only when a command runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moe_serve.cli.commands import add_commands, find_commands
from moe_serve.cli.plan import solve

HELP = "Place experts on GPUs: least traffic, balanced load, with a proven gap."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    commands = find_commands(__name__, __path__)
    first = argv[list(argv).index("plan") + 1 :][:1]
    if first and first[0] in commands:
        add_commands(parser, __name__, __path__, argv)
        return
    solve.add_arguments(parser, argv)
    others = " | ".join(name for name in commands if name != "solve")
    parser.epilog = f"`plan TRACE` is short for `plan solve TRACE`. Also: `plan {others}`, each with its own --help."


def run(args: argparse.Namespace) -> int:
    return solve.run(args)
