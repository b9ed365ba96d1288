"""Flags generated from config dataclasses, so that help text, flags and settings cannot drift apart.

A field `max_num_seqs: int` becomes `--max-num-seqs N`; a bool becomes `--x / --no-x`. A flag that
is not given is absent from the parsed arguments, and the dataclass's own default holds. A field
of type `tuple[str, ...]` becomes a flag that may be given several times.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import moe_serve
from moe_serve.config import flag_name
from moe_serve.hf.families import family_names

C = TypeVar("C")


def default_model() -> str:
    """Folder of the demo model that is part of the package."""
    return str(Path(moe_serve.__file__).parent / "demo" / "model")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=default_model(),
        help="Folder of a Hugging Face checkpoint. Default: the small demo model in this package. "
        f"Its model_type is one of {', '.join(family_names())}.",
    )


def add_config_flags(parser: argparse.ArgumentParser, config: type, skip: tuple[str, ...] = ()) -> None:
    """One flag per field of a config dataclass."""
    group = parser.add_argument_group(config.__name__)
    for field, kind in _fields(config):
        if field.name not in skip:
            add_flag(group, field.name, kind, _help_of(field), field.metadata.get("choices"))


def add_flag(
    group: argparse._ActionsContainer,
    name: str,
    kind: type,
    help: str,
    choices: tuple[str, ...] | None = None,
) -> None:
    """A flag that stays out of the parsed arguments unless it is given. `help` is plain text, no % codes."""
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
    if kind is bool:
        group.add_argument(flag_name(name), action=argparse.BooleanOptionalAction, **settings)
        return
    if kind is tuple:
        group.add_argument(flag_name(name), action="append", metavar="TEXT", **settings)
        return
    metavar = None if choices else {int: "N", float: "X"}.get(kind, "TEXT")
    group.add_argument(flag_name(name), type=kind, choices=choices, metavar=metavar, **settings)


def given(args: argparse.Namespace, names: typing.Collection[str]) -> dict[str, Any]:
    """Of these settings, the ones on the command line."""
    return {name: value for name, value in vars(args).items() if name in names}


def config_from_args(args: argparse.Namespace, config: type[C]) -> C:
    """The config dataclass with the given flags applied. ConfigError if a value cannot be."""
    values = given(args, [field.name for field, _ in _fields(config)])
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def field_kinds(config: type) -> Mapping[str, type]:
    """The type a flag's text is turned into, by field name: `int | None` counts as int."""
    return {field.name: kind for field, kind in _fields(config)}


def _fields(config: type) -> Iterator[tuple[dataclasses.Field[Any], type]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if typing.get_origin(hint) is tuple:
            yield field, tuple
            continue
        options = [kind for kind in typing.get_args(hint) if kind is not NoneType]
        yield field, options[0] if options else hint


def _help_of(field: dataclasses.Field[Any]) -> str:
    text: str = field.metadata["help"]
    if field.default in (None, ()) or "default:" in text.lower():
        return text
    return f"{text} Default: {_spelt(field)}."


def _spelt(field: dataclasses.Field[Any]) -> str:
    """A default as one would type it."""
    if isinstance(field.default, bool):
        return flag_name(field.name) if field.default else flag_name("no_" + field.name)
    return str(field.default)
