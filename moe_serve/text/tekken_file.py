"""Mistral's tekken.json as a tokenizer, by transformers' own conversion. Knows no chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import processors

from moe_serve.errors import ConfigError, one_line
from moe_serve.text.converted import fields_of, load_converted

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""The file names them by their texts only."""


def find(folder: Path) -> Path | None:
    """The folder's tekken file; the newest where there are several."""
    return max(folder.glob("tekken*.json"), default=None)


def load(file: Path) -> Any:
    """transformers' tokenizer, which puts <s> before a text. ConfigError: the file is not as it should be."""
    try:  # imported here: it imports mistral-common where that is installed
        from transformers.integrations.mistral.tokenizer import MistralConverter

        backend = MistralConverter(str(file)).converted()
    except ImportError as error:  # a file of 2024 does not list its special tokens
        raise ConfigError(
            f"{file}: lists no special tokens, which the package mistral-common knows; run `pip install mistral-common`"
        ) from error
    except Exception as error:  # tokenizers raises Exception itself
        raise ConfigError(f"{file}: cannot be read as a tekken file ({one_line(error)})") from error
    special = {name: token for name, token in SPECIAL.items() if backend.token_to_id(token) is not None}
    if (number := backend.token_to_id(SPECIAL["bos_token"])) is not None:
        bos = SPECIAL["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
        )
    return load_converted(backend, file.parent, {**special, **fields_of(file.parent)})
