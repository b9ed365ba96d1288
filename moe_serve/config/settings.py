"""Settings: frozen dataclasses whose fields carry their help text, and may be grouped in parts.

A setting in a part has two names: the attribute (`config.experts.cache_mib`) and one flat name (`moe_cache_mib`),
from which its flag (`--moe-cache-mib`), its keyword in `LLM(...)` and the name in error messages are made.

    EngineConfig.of(model="m", moe_cache_mib=64)                         # flat
    EngineConfig(model="m", experts=ExpertCacheConfig(cache_mib=64))     # the same, nested

Knows no flag parser and none of the settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, Self

from moe_serve.errors import ConfigError

Bound = Literal["positive", "not negative", "port", "threads"]
MOST = {"port": 65535, "threads": 1024}
"""Of numbers with such a bound."""
MOST_INTEGER = (1 << 31) - 1
"""Of all others with a bound: a product of two fits into 64 bits."""
UNITS = {"_mib": "MIB", "_s": "S"}
"""End of a flat name -> what `--help` shows for its value."""


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    *,
    bound: Bound | None = None,
    heading: str | None = None,
    flat: str | None = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with all that flags, docs and errors need.

    choices: allowed values. bound: allowed numbers. heading: its group in `--help`, if not the class's.
    flat: its flat name, if not PREFIX and the field's name. aliases: older or foreign flat names, not shown in
    `--help`. secret: not shown in logs. metavar: what stands for the value in `--help`; FILE must exist.
    """
    facts = {"help": help, "choices": choices, "bound": bound, "heading": heading, "flat": flat, "aliases": aliases}
    facts["metavar"] = metavar
    return dataclasses.field(default=default, repr=not secret, metadata=facts)


def flag_name(flat_name: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + flat_name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value that a user can set."""

    name: str
    """Its flat name."""
    part: str | None
    """Field of the config that holds it; None: it is a field of the config itself."""
    field: dataclasses.Field[Any]
    kind: type
    """See `kind_of`."""
    is_optional: bool
    heading: str

    @property
    def flag(self) -> str:
        return flag_name(self.name)

    @property
    def aliases(self) -> tuple[str, ...]:
        found: tuple[str, ...] = self.field.metadata["aliases"]
        return found

    @property
    def metavar(self) -> str:
        """What stands for the value in `--help`: its unit, if the name has one."""
        unit = next((shown for suffix, shown in UNITS.items() if self.name.endswith(suffix)), None)
        found: str = self.field.metadata["metavar"] or unit or {int: "N", float: "X"}.get(self.kind, "TEXT")
        return found

    @property
    def choices(self) -> tuple[str, ...] | None:
        found: tuple[str, ...] | None = self.field.metadata["choices"]
        return found

    def check(self, value: Any) -> None:
        """ConfigError if the value has a wrong type or is out of range."""
        if value is None and self.is_optional:
            return
        if not _is_a(value, self.kind):
            wanted = "a list of strings" if self.kind is tuple else self.kind.__name__
            raise ConfigError(f"{self.flag} takes {wanted}, got {value!r}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.flag}: {value!r} is not one of {', '.join(self.choices)}")
        bound: Bound | None = self.field.metadata["bound"]
        if bound == "positive" and not value > 0:
            raise ConfigError(f"{self.flag} must be positive, got {value}")
        if bound == "threads" and not value > 0:
            raise ConfigError(f"{self.flag} must be positive, got {value}")
        if bound in ("not negative", "port") and not value >= 0:
            raise ConfigError(f"{self.flag} must not be negative, got {value}")
        most = MOST.get(bound or "", MOST_INTEGER)
        if bound is not None and self.kind is int and value > most:
            raise ConfigError(f"{self.flag} must be at most {most}, got {value}")


def _plain(value: Any, kind: type) -> Any:
    """Paths as strings and lists as tuples, so that configs can be compared and sent."""
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(value) if kind is tuple and isinstance(value, list) else value


def _is_a(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)


class Settings:
    """Base of all configs and of their parts. Values are checked whenever one is made."""

    PREFIX: ClassVar[str] = ""
    """Of the flat names, where this is a part of a config."""
    HEADING: ClassVar[str] = ""
    """Of its flags in `--help`."""

    def __post_init__(self) -> None:
        for setting in own_settings(type(self)):
            value = getattr(self, setting.field.name)
            plain = _plain(value, setting.kind)
            if plain is not value:
                object.__setattr__(self, setting.field.name, plain)
            setting.check(plain)
        self.check()

    def check(self) -> None:
        """ConfigError where settings contradict each other."""

    def no_effect(self) -> str | None:
        """A setting that the user gave and that nothing will read, with the fix; None: there is none."""
        return None

    @classmethod
    def of(cls, **values: Any) -> Self:
        """From flat names, aliases and whole parts. ConfigError: an unknown name, or a value that cannot be."""
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `of`. A part may also be a mapping of its own fields, as `dataclasses.asdict` makes it."""
        (known,) = sort_out(cls.__name__, values, cls)
        return cls(**_nested(cls, known, {}))

    def replace(self, **values: Any) -> Self:
        """A copy with some settings changed, by the names that `of` takes."""
        (known,) = sort_out(type(self).__name__, values, type(self))
        return dataclasses.replace(self, **_nested(type(self), known, vars(self)))  # type: ignore[type-var]


def kind_of(hint: Any) -> type:
    """The type a flag's text is turned into: `int | None` counts as int, `tuple[str, ...]` as tuple."""
    if typing.get_origin(hint) is tuple:
        return tuple
    kinds: list[type] = [kind for kind in typing.get_args(hint) if kind is not NoneType]
    return kinds[0] if kinds else hint


def parts_of(config: type[Settings]) -> dict[str, type[Settings]]:
    """The fields that are configs themselves."""
    hints = typing.get_type_hints(config)
    found = {field.name: hints[field.name] for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return {name: hint for name, hint in found.items() if isinstance(hint, type) and issubclass(hint, Settings)}


def own_settings(config: type[Settings], part: str | None = None) -> Iterator[Setting]:
    """The settings among a config's own fields, under their flat names."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if "help" not in field.metadata:
            continue
        hint = hints[field.name]
        name = field.metadata["flat"] or config.PREFIX + field.name
        heading = field.metadata["heading"] or config.HEADING
        yield Setting(name, part, field, kind_of(hint), NoneType in typing.get_args(hint), heading)


def settings_of(config: type[Settings]) -> list[Setting]:
    """Every setting of a config, those of its parts after its own."""
    found = list(own_settings(config))
    for name, part in parts_of(config).items():
        found += own_settings(part, name)
    return found


def sort_out(owner: str, values: Mapping[str, Any], *configs: type[Settings]) -> list[dict[str, Any]]:
    """`values` divided among the configs that know their names. ConfigError on an unknown one suggests the nearest."""
    divided: list[dict[str, Any]] = [{} for _ in configs]
    names = [_names(config) for config in configs]
    for key, value in values.items():
        home = next((i for i, known in enumerate(names) if key in known), None)
        if home is None:
            near = difflib.get_close_matches(key, [name for known in names for name in known], n=1)
            raise ConfigError(f"{owner} has no setting {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        divided[home][key] = value
    return divided


def _names(config: type[Settings]) -> list[str]:
    settings = settings_of(config)
    flat = [name for setting in settings for name in (setting.name, *setting.aliases)]
    return [*flat, *parts_of(config), *(setting.field.name for setting in settings if setting.part is None)]


def _nested(config: type[Settings], values: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a config from flat names; a part starts from the one in `before`, or from its defaults."""
    found: dict[str, Any] = {}
    parts = parts_of(config)
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name in parts:
            found[name] = parts[name].from_dict(value) if isinstance(value, Mapping) else value
    for setting in settings_of(config):
        spellings = {setting.name, *setting.aliases} | ({setting.field.name} if setting.part is None else set())
        for name in spellings & values.keys():
            target = found if setting.part is None else changes.setdefault(setting.part, {})
            target[setting.field.name] = values[name]
    for part, changed in changes.items():
        base = found.get(part, before.get(part))
        found[part] = parts[part](**changed) if base is None else dataclasses.replace(base, **changed)
    return found


def refuse_no_effect(*configs: Settings) -> None:
    """ConfigError where one of the user's settings would do nothing."""
    for config in configs:
        complaint = config.no_effect()
        if complaint is not None:
            raise ConfigError(complaint)


def changed_settings(config: Settings) -> dict[str, Setting]:
    """Those of a config's own settings that are not at their defaults, by field name."""
    found = {setting.field.name: setting for setting in own_settings(type(config))}
    return {name: setting for name, setting in found.items() if getattr(config, name) != setting.field.default}
