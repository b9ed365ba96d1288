"""Model families by name: each file here is named after config.json's `model_type` and exports `FAMILY`.

A package from outside offers one as an entry point of the group "moe_serve.families".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_serve.errors import UnsupportedModelError
from moe_serve_base.extensions import Extensions

FAMILIES = Extensions(
    "model_type",
    __name__,
    __path__,
    symbol="FAMILY",
    group="moe_serve.families",
    attributes=("experts_class", "match", "activation", "routing"),
)


TEXT_MODEL = "_text"
"""What transformers puts behind the name of a family with other towers, for its text model alone."""


def family_name(model_type: str) -> str | None:
    """The family of a model_type, its text model's included; None: not supported."""
    names = (model_type, model_type.removesuffix(TEXT_MODEL))
    return next((name for name in names if name in family_names()), None)


def family_in(fields: Mapping[str, Any]) -> str | None:
    """The family of config.json's fields: of the whole checkpoint, else of the text model in it."""
    text = fields.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    names = (family_name(str(name)) for name in (fields.get("model_type"), inner))
    return next((name for name in names if name is not None), None)


def family_names() -> list[str]:
    """Every model_type that is supported, in alphabetical order. Imports no torch: help must answer at once."""
    return FAMILIES.names()


def refuse_unknown_family(fields: Mapping[str, Any]) -> str:
    """The name of the family of config.json's fields. UnsupportedModelError lists the supported ones for another."""
    name = family_in(fields)
    if name is None:
        raise UnsupportedModelError(
            f"model_type {fields.get('model_type')!r} is not a Mixture-of-Experts family moe-serve supports;"
            f" supported: {', '.join(family_names())}"
        )
    return name
