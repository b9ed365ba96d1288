"""Public names of a package that load on first use, so that importing the package costs nothing.

Knows only importlib; what the names are, their package says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def loader(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for `package`. `homes`: public name -> "module inside it:name there"."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name].split(":")
        return getattr(importlib.import_module(f"{package}.{module}"), attribute)

    return get
