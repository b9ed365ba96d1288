"""Finds commands: a file's name is the command's name, and the file exports what `Command` lists.

Other files in the folder are helpers. A folder is a command with commands of its own: its `__init__.py` exports
HELP, and the rest only where the folder's name alone does something.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import textwrap
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NoReturn, Protocol, cast


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples, and never breaks a flag's name at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Flags are spelt out in full: an abbreviation would change its meaning when a flag is added."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(**settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """One line rather than the whole usage, in which the line would be lost."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Command(Protocol):
    """What a command's file exports. Where it also has these, they are used:

    USAGE: a short line instead of argparse's list of all flags, such as "[MODEL] [flags]".
    EXAMPLES: command lines to show above the flags.
    EXTRA_ARGUMENT: what to say of a word that is one too many.
    PASSES_ON: whether what follows `--` is for another program; `args.rest` has it.
    """

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class Group:
    """A folder of commands, as a command: one of them has to be named."""

    def __init__(self, module: ModuleType) -> None:
        self.HELP: str = module.HELP
        self.__name__, self.__path__ = module.__name__, module.__path__

    def add_arguments(self, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
        add_commands(parser, self.__name__, self.__path__, argv)

    def run(self, args: argparse.Namespace) -> int:
        raise AssertionError("a sub-command is required, so its own `run` is called")


def find_commands(package: str, path: Iterable[str]) -> dict[str, Command]:
    """The commands in a package's folder, by name."""
    modules = {info.name: importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path)}
    with_help = {name: module for name, module in modules.items() if hasattr(module, "HELP")}
    return {
        name: cast(Command, module) if hasattr(module, "run") else Group(module) for name, module in with_help.items()
    }


def add_commands(parser: argparse.ArgumentParser, package: str, path: Iterable[str], argv: Sequence[str]) -> None:
    """Give `parser` one sub-command per command in the folder; the parsed one lands in `args.run`.

    Commands that `argv` does not mention are listed but get no arguments: building those takes time.
    """
    choices = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in find_commands(package, path).items():
        sub = choices.add_parser(name, help=command.HELP, description=_description(command))
        sub.set_defaults(run=command.run, parser=sub, extra_argument=getattr(command, "EXTRA_ARGUMENT", None))
        sub.set_defaults(passes_on=getattr(command, "PASSES_ON", False))
        if hasattr(command, "USAGE"):
            sub.usage = f"%(prog)s {command.USAGE}"
        if name in argv:
            command.add_arguments(sub, argv)


def _description(command: Command) -> str:
    examples: Sequence[str] = getattr(command, "EXAMPLES", ())
    shown = "".join(f"\n    {line}" for line in examples)
    return command.HELP + (f"\n\nExamples:{shown}" if shown else "")
