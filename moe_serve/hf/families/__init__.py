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
THINKER = "_thinker"
"""The same for what understands, in a family that also speaks."""


def family_name(model_type: str) -> str | None:
    """The family of a model_type, its text model's included; None: not supported."""
    names = (model_type, model_type.removesuffix(TEXT_MODEL), model_type.removesuffix(THINKER))
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
        raise UnsupportedModelError(refusal(str(fields.get("model_type"))))
    return name


MISSING = {
    "dbrx": "experts in flattened matrices",
    "deepseek_ocr2": "an image encoder: it reads pages and answers no text alone",
    "diffusion_gemma": "decoding of whole blocks by diffusion",
    "dots3_note": "sparse attention with sliding layers",
    "ernie4_5_vl_moe": "two groups of experts in one layer",
    "glm5_next": "linear attention with an indexer and hyper-connections",
    "hy_v4": "sparse latent attention with sinks and hyper-connections",
    "inkling2": "short convolutions inside attention",
    "inkling_mm_model": "short convolutions inside attention",
    "jetmoe": "experts inside attention",
    "longcat_flash": "experts that hand tokens on unchanged",
    "minimax_m3_vl": "block-sparse attention",
    "mistral_large4": "sparse attention with position-free layers",
    "muse_spark": "a norm behind each expert",
    "nllb-moe": "an encoder beside the decoder",
    "openai_privacy_filter": "a classifier's answer per token, which is no text",
    "qwen4_exp": "sparse attention, hyper-connections and n-gram embeddings",
    "step3p7": "experts with a limit of their own in each layer",
    "switch_transformers": "an encoder beside the decoder",
    "unlimited_ocr": "an image encoder: it reads pages and answers no text alone",
    "zaya": "convolutions and delayed values inside attention",
}
"""Mixture-of-Experts models of transformers that are not served, and the kind of layer that is missing here."""


def refusal(model_type: str) -> str:
    """What to say of a model_type that is not supported."""
    kind = MISSING.get(model_type.removesuffix(TEXT_MODEL))
    why = "a Mixture-of-Experts family moe-serve supports" if kind is None else f"served: it needs {kind}"
    return f"model_type {model_type!r} is not {why}; supported: {', '.join(family_names())}"
