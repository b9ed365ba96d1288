"""The command line: `moe-serve serve | generate | chat | bench ...`.

A command is a file in this folder, found by listing it (see `commands.py`). Commands import torch
and transformers only when they run, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from moe_serve import __version__
from moe_serve.cli.commands import Parser, add_commands
from moe_serve.cli.foreign_flags import HINTS
from moe_serve.errors import ConfigError, InvalidRequestError, MoEServeError
from moe_serve.openmp import spin_briefly
from moe_serve_base.extensions import ExtensionError
from moe_serve_base.whole_files import OutputError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. A mistake of the user's is one line on stderr, no traceback."""
    spin_briefly(os.environ)
    args = parse(argv)
    try:
        status: int = args.run(args)
        return status
    except (ConfigError, InvalidRequestError, ExtensionError, OutputError) as error:
        return _complain(error, EXIT_USAGE)
    except MoEServeError as error:
        return _complain(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _reader_went_away()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the chosen command, with its `run`. Exits with status 2 on a mistake, like argparse."""
    words = sys.argv[1:] if argv is None else argv
    parser = _parser(words)
    args, unknown = parser.parse_known_args(words)
    if args.passes_on and "--" in words:
        cut = words.index("--")
        args, unknown = parser.parse_known_args(words[:cut])
        args.rest = words[cut + 1 :]
    if unknown:
        args.parser.error(_unknown_message(unknown, args.parser, args.extra_argument))
    return args


def whole_parser() -> argparse.ArgumentParser:
    """A parser with the arguments of every command, which takes a while to build."""
    return _parser([name.rpartition(".")[2] for _, name, _ in pkgutil.walk_packages(__path__, __name__ + ".")])


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="moe-serve", description="Serve Mixture-of-Experts language models.")
    parser.add_argument("--version", action="version", version=f"moe-serve {__version__}")
    add_commands(parser, __name__, __path__, words)
    return parser


def _unknown_message(unknown: Sequence[str], parser: argparse.ArgumentParser, extra: str | None) -> str:
    """Names the first unknown flag, and what to give instead: its name here, or the known flag most like it."""
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        return f"unexpected argument: {unknown[0]}" + (f"; {extra}" if extra else "")
    if flags[0] in HINTS:
        return f"unknown flag {flags[0]}; {HINTS[flags[0]]}"
    known = re.findall(r"--[\w-]+", parser.format_help())
    near = get_close_matches(flags[0], known, n=1)
    return f"unknown flag {flags[0]}" + (f"; did you mean {near[0]}?" if near else "")


def _complain(error: Exception, status: int) -> int:
    print(f"moe-serve: error: {error}", file=sys.stderr)
    return status


def _reader_went_away() -> int:
    """`moe-serve generate | head` closed our output; leave quietly, also in the flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILED
