"""Extensions by name: the files of one folder, and what installed packages add from outside.

A file `<name>.py` in the folder exports one agreed symbol. A package from outside names the same symbol in its
pyproject.toml, under the group of the folder:

    [project.entry-points."moe_serve.policies"]
    mru = "my_package.mru:POLICY"

Listing names imports no extension, so `--help` stays quick and one broken package hides no other name. An extension
is imported when it is asked for by name. Knows the form of an extension only by the attributes it must have.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class ExtensionError(ValueError):
    """An extension that is unknown, offered twice, or cannot be used. `problem` is one line without the kind."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(f"{kind} {problem}")
        self.problem = problem


@dataclass(frozen=True)
class Extensions:
    """All extensions of one kind."""

    kind: str
    """What one is called in messages, such as "policy"."""
    package: str
    """The package whose files are the extensions from inside."""
    path: Iterable[str]
    """That package's `__path__`."""
    symbol: str
    """What each file exports."""
    group: str
    """The entry point group of the extensions from outside."""
    attributes: tuple[str, ...]
    """What the exported symbol must have."""
    helpers: tuple[str, ...] = ()
    """Files of the folder that are no extensions."""

    def names(self) -> list[str]:
        """Every extension, in alphabetical order."""
        return sorted({*self._inside(), *(point.name for point in self._outside())})

    def find(self, name: str) -> Any:
        """What extension `name` exports. ExtensionError where there is none, more than one, or it is broken."""
        offers = [point for point in self._outside() if point.name == name]
        inside = name in self._inside()
        if len(offers) + inside > 1:
            owners = ["moe-serve"] * inside + [_owner(point) for point in offers]
            raise ExtensionError(self.kind, f"{name!r} is offered by {' and by '.join(owners)}; uninstall all but one")
        if inside:
            return getattr(importlib.import_module(f"{self.package}.{name}"), self.symbol)
        if not offers:
            raise ExtensionError(self.kind, f"{name!r} is not one of {', '.join(self.names())}")
        return self._load(offers[0])

    def _inside(self) -> set[str]:
        return {info.name for info in pkgutil.iter_modules(self.path)} - set(self.helpers)

    def _outside(self) -> list[EntryPoint]:
        """Without doubles: an editable install can list one package twice."""
        return sorted(set(entry_points(group=self.group)), key=lambda point: (point.name, point.value))

    def _load(self, point: EntryPoint) -> Any:
        """Whatever a package from outside raises while it is imported becomes one line that names the package."""
        try:
            found = point.load()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise self._broken(point, f"cannot be imported: {type(error).__name__}: {reason}") from error
        missing = [name for name in self.attributes if not hasattr(found, name)]
        if missing:
            raise self._broken(point, f"has no {', '.join(missing)}")
        return found

    def _broken(self, point: EntryPoint, what: str) -> ExtensionError:
        return ExtensionError(self.kind, f"{point.name!r} of {_owner(point)} ({point.value}) {what}")


def _owner(point: EntryPoint) -> str:
    return f"package {point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
