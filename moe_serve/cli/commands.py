"""Finds commands: a file's name is the command's name, and the file exports what `Command` lists.

Other files in the folder are helpers. A folder with an `__init__.py` that exports the same names
is a command with commands of its own.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import NoReturn, Protocol, cast


class Parser(argparse.ArgumentParser):
    """Flags are spelt out in full: an abbreviation would change its meaning when a flag is added."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """One line rather than the whole usage, in which the line would be lost."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Command(Protocol):
    """What a command's file exports."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def find_commands(package: str, path: Iterable[str]) -> dict[str, Command]:
    """The commands in a package's folder, by name."""
    modules = {info.name: importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path)}
    wanted = ("HELP", "add_arguments", "run")
    return {name: cast(Command, module) for name, module in modules.items() if all(hasattr(module, w) for w in wanted)}


def add_commands(parser: argparse.ArgumentParser, package: str, path: Iterable[str], argv: Sequence[str]) -> None:
    """Give `parser` one sub-command per command in the folder; the parsed one lands in `args.run`.

    Commands that `argv` does not mention are listed but get no arguments: building those takes time.
    """
    choices = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in find_commands(package, path).items():
        sub = choices.add_parser(name, help=command.HELP, description=command.HELP)
        sub.set_defaults(run=command.run, parser=sub)
        if name in argv:
            command.add_arguments(sub, argv)
