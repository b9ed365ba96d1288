"""Prediction methods by file name: each file here exports `METHOD`, a class with the form of `Predictor`.

Listing names imports nothing, so that `--help` stays quick.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from predictors.predictor import Predictor


def method_names() -> list[str]:
    """Every method, in alphabetical order."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def find_method(name: str) -> type[Predictor]:
    """The method in `<name>.py`. Raises ValueError naming the ones there are."""
    if name not in method_names():
        raise ValueError(f"method {name!r} is not one of {', '.join(method_names())}")
    method: type[Predictor] = importlib.import_module(f"{__name__}.{name}").METHOD
    return method
