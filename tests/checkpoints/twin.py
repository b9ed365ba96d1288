"""A twin: what a published checkpoint's config.json, tensors and codes have beyond a tiny model of its family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.families.quantized_checkpoints import Format


@dataclass(frozen=True)
class Composite:
    """A text model beside towers for images or sound."""

    prefix: str
    """Of the text model's tensors."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of config.json, beside text_config."""
    tower: str = "model.visual."
    """Prefix of tensors that are not read."""
    text_type: str | None = None
    """model_type in text_config, where it is another than transformers writes."""
    codes_inside: bool = False
    """quantization_config lies in text_config."""


def always(_name: str) -> bool:
    return True


@dataclass(frozen=True)
class Twin:
    """One checkpoint as it was published, scaled down. Sizes are those of the tiny case."""

    case: str
    stored: str
    """How its weights are stored, in words."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of config.json, beside those of the tiny case."""
    dropped: tuple[str, ...] = ()
    """Fields of the tiny case that the published config does not have."""
    form: Format | None = None
    """How its matrices are coded."""
    coded: Callable[[str], bool] = always
    """By a tensor's name, whether it is."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """Of quantization_config, beside those of the format."""
    is_mxfp4: bool = False
    """Its experts are GPT-OSS's blocks."""
    behind: tuple[str, ...] = ()
    """Further tensors of a layer behind the last one, which is a copy of the last one otherwise (MTP)."""
    further: tuple[str, ...] = ()
    """Tensors under `mtp.`, beside a copy of the last layer as `mtp.layers.0`."""
    composite: Composite | None = None
    splits: bool = False
    """Experts are a tensor each, where transformers writes one for all."""
    reference_type: str | None = None
    """model_type under which transformers knows the model, where config.json names another."""
    end_tokens: tuple[int, ...] = (3, 5)
    """Of generation_config.json."""
    template: str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Row:
    """One line of the table of checkpoints."""

    name: str
    """On the Hugging Face Hub."""
    model_type: str
    """Of its config.json."""
    twin: Twin | None
    """None: refused."""
    lacks: str = ""
    """What keeps the checkpoint from being read, where its family is served."""
