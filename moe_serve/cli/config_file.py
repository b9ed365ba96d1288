"""`serve --config FILE`: settings from YAML, below those of the command line; and `--print-config`, which writes them.

Keys are the flags' names, with or without dashes, and `model`. Knows settings; knows no engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_serve.cli.flags import default_model
from moe_serve.config.settings import Settings, settings_of, sort_out
from moe_serve.errors import ConfigError

HINT = "keys are the flags of `moe-serve serve --help` without their dashes"


# yaml is imported in the functions: every command line imports this file.


def read_config(file: str, *configs: type[Settings]) -> dict[str, Any]:
    """The settings of a file by flat name. ConfigError names the file, and the key that is unknown or wrong."""
    from yaml import YAMLError, safe_load

    try:
        found = safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"--config: cannot read {file}: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"--config: {file} must hold one setting a line, such as `port: 8000`; {HINT}")
    names = _names(configs)
    values = {key.replace("-", "_"): value for key, value in found.items()}
    try:
        sorted_out = sort_out("the file", values, *configs)
        for config, own in zip(configs, sorted_out, strict=True):
            config.from_dict(own)
        if whole := sorted(values.keys() - names.keys()):
            raise ConfigError(f"{whole[0]!r} is no flag")
    except ConfigError as error:
        raise ConfigError(f"--config: {file}: {error.message}; {HINT}") from error
    return {names[key]: value for key, value in values.items()}


def _names(configs: Sequence[type[Settings]]) -> dict[str, str]:
    """Spelling -> flat name."""
    settings = [setting for config in configs for setting in settings_of(config)]
    return {spelling: setting.name for setting in settings for spelling in (setting.name, *setting.aliases)}


def merge(args: argparse.Namespace, configs: Sequence[type[Settings]]) -> None:
    """Give `args` the settings of its --config that its command line does not have."""
    values = {} if args.config is None else read_config(args.config, *configs)
    for name, value in values.items():
        is_given = args.model != default_model() if name == "model" else hasattr(args, name)
        if not is_given:
            setattr(args, name, tuple(value) if isinstance(value, list) else value)


def as_yaml(*configs: Settings) -> str:
    """All settings under their headings, with their values. API keys are left out."""
    from yaml import safe_dump

    lines: list[str] = []
    heading = None
    for config in configs:
        for setting in settings_of(type(config)):
            home: Any = config if setting.part is None else getattr(config, setting.part)
            if not setting.field.repr:
                continue
            if setting.heading != heading:
                heading = setting.heading
                lines.append(f"\n# {heading}")
            value = getattr(home, setting.field.name)
            plain = list(value) if isinstance(value, tuple) else value
            lines.append(safe_dump({setting.name.replace("_", "-"): plain}, allow_unicode=True).strip())
    return "\n".join(lines).strip()
