"""Prediction methods by name: each file here exports `METHOD`, a class with the form of `Predictor`.

A package from outside offers one as an entry point of the group "moe_serve.predictors".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_serve_base.extensions import Extensions

if TYPE_CHECKING:
    from predictors.predictor import Predictor

METHODS = Extensions(
    "method",
    __name__,
    __path__,
    symbol="METHOD",
    group="moe_serve.predictors",
    attributes=("needs", "fit", "from_arrays", "arrays", "begin", "step", "observe", "probabilities"),
)


def method_names() -> list[str]:
    """Every method, in alphabetical order."""
    return METHODS.names()


def find_method(name: str) -> type[Predictor]:
    """The method of that name. ExtensionError (a ValueError) names the ones there are, or what is wrong with it."""
    method: type[Predictor] = METHODS.find(name)
    return method
