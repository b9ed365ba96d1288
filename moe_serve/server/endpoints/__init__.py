"""One file per endpoint; `find` lists them, so that a new one is a new file and nothing else.

An endpoint file has a `router` with its routes. Where more is needed than including the router (state of its own, a
condition), it has a function `add(app, service)` that does it.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def find() -> list[ModuleType]:
    """The modules of all endpoint files, by name. Sub-folders hold what endpoints share."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg)
    return [importlib.import_module(f"{__name__}.{name}") for name in names]
