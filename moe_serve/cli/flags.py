"""Flags generated from configs, so that help text, flags and settings cannot drift apart.

A setting `max_num_seqs: int` becomes `--max-num-seqs N`; a bool becomes `--x / --no-x`. A flag that
is not given is absent from the parsed arguments, and the dataclass's own default holds. A setting
of type `tuple[str, ...]` becomes a flag that may be given several times. An alias works and is not shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from moe_serve.config.engine import EngineConfig
from moe_serve.config.queue import QueueConfig
from moe_serve.config.settings import Setting, Settings, flag_name, kind_of, settings_of
from moe_serve.demo import MODEL
from moe_serve.hf.families import family_names

S = TypeVar("S", bound=Settings)


def names_of(*configs: type[Settings]) -> list[str]:
    """The flat names of their settings, as `skip` takes them."""
    return [setting.name for config in configs for setting in settings_of(config)]


OF_HUB = ("revision", "offline")
OF_SERVER = ("model", *names_of(QueueConfig))
"""Settings without a flag in commands that load a model for themselves: MODEL is an argument, and nothing waits."""


def default_model() -> str:
    """Folder of the demo model that is part of the package."""
    return str(MODEL)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=default_model(),
        help="Folder of a Hugging Face checkpoint, a GGUF file, or a model id of the Hugging Face Hub (org/name, or"
        " org/name:Q4_K_M for one of its GGUF files), downloaded where the local cache lacks it."
        " The values of model_type that are supported stand below the flags."
        " Default: the small demo model in this package.",
    )
    parser.epilog = textwrap.fill(f"Supported values of model_type: {', '.join(family_names())}.", 100)


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    """What EngineConfig has for model ids, in commands without its flags."""
    for setting in settings_of(EngineConfig):
        if setting.name in OF_HUB:
            add_flag(parser, setting.name, setting.kind, _help_of(setting))


def add_config_flags(parser: argparse.ArgumentParser, *configs: type[Settings], skip: Collection[str] = ()) -> None:
    """One flag per setting, grouped by heading. `skip`: flat names that get none."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in (setting for config in configs for setting in settings_of(config)):
        if setting.name in skip:
            continue
        if setting.heading not in groups:
            groups[setting.heading] = parser.add_argument_group(setting.heading)
        shared = (setting.choices, setting.metavar)
        add_flag(groups[setting.heading], setting.name, setting.kind, _help_of(setting), *shared)
        for alias in setting.aliases:
            add_flag(groups[setting.heading], setting.name, setting.kind, argparse.SUPPRESS, *shared, spelling=alias)


def add_flag(
    group: argparse._ActionsContainer,
    name: str,
    kind: type,
    help: str,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    spelling: str | None = None,
) -> None:
    """A flag that stays out of the parsed arguments unless it is given. `help` is plain text, no % codes.

    `spelling`: another flat name that the flag is made from.
    """
    flag = flag_name(spelling or name)
    shown = help if help == argparse.SUPPRESS else help.replace("%", "%%")
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": shown}
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        return
    if kind is tuple:
        group.add_argument(flag, action="append", metavar="TEXT", **settings)
        return
    metavar = None if choices else metavar or {int: "N", float: "X"}.get(kind, "TEXT")
    group.add_argument(flag, type=kind, choices=choices, metavar=metavar, **settings)


def given(args: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Of these settings, the ones on the command line."""
    return {name: value for name, value in vars(args).items() if name in names}


def config_from_args(args: argparse.Namespace, config: type[S]) -> S:
    """The config with the given flags applied. ConfigError if a value cannot be."""
    return config.from_dict(given(args, names_of(config)))


def field_kinds(dataclass: type) -> Mapping[str, type]:
    """The type a flag's text is turned into, by field name: `int | None` counts as int."""
    hints = typing.get_type_hints(dataclass)
    return {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(dataclass)}


def _help_of(setting: Setting) -> str:
    text: str = setting.field.metadata["help"]
    if setting.field.default in (None, ()) or "default:" in text.lower():
        return text
    return f"{text} Default: {_spelt(setting)}."


def _spelt(setting: Setting) -> str:
    """A default as one would type it."""
    default = setting.field.default
    if isinstance(default, bool):
        return setting.flag if default else flag_name("no_" + setting.name)
    return str(default)
