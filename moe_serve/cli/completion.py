"""`moe-serve completion SHELL`: a script that completes commands and flags in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moe_serve.cli import whole_parser

HELP = "Print a script that completes commands and flags in a shell."
USAGE = "SHELL"
EXAMPLES = (
    "moe-serve completion bash > ~/.local/share/bash-completion/completions/moe-serve",
    "moe-serve completion zsh > ~/.zfunc/_moe-serve",
)
SHELLS = ("bash", "zsh")


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"One of {', '.join(SHELLS)}.")


def run(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(whole_parser(), shell=args.shell))
    return 0
