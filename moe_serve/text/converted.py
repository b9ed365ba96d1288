"""A tokenizer in another format becomes tokenizer.json, beside the checkpoint's own special tokens and chat templates.

From then on it is read as any other. Knows files; knows neither what the vocabulary was made from nor who asks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from moe_serve.config.model_folder import read_object
from moe_serve.text.tokenizer_files import WHOLE

CONFIG = "tokenizer_config.json"
BESIDE = ("chat_template.jinja", "special_tokens_map.json")
TEMPLATES = "additional_chat_templates"
OF_ANOTHER_CLASS = ("auto_map", "tokenizer_class")
"""Fields that name the class which the vocabulary was written for."""


def fields_of(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing where there is none. CheckpointError."""
    return read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def add_tokens(backend: Tokenizer, tokens: Sequence[tuple[str, bool]]) -> None:
    """Append tokens in the order of their ids; each is (text, whether decoding may skip it)."""
    for text, is_special in tokens:
        add = backend.add_special_tokens if is_special else backend.add_tokens
        add([AddedToken(text, normalized=False)])


def load_converted(backend: Tokenizer, folder: Path, fields: Mapping[str, Any]) -> Any:
    """transformers' tokenizer of `backend`, with `fields` as its tokenizer_config.json and the folder's templates."""
    with TemporaryDirectory() as place:
        target = Path(place)
        backend.save(str(target / WHOLE))
        kept = {name: value for name, value in fields.items() if name not in OF_ANOTHER_CLASS}
        (target / CONFIG).write_text(json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast"}))
        for name in BESIDE:
            if (folder / name).is_file():
                shutil.copy(folder / name, target)
        if (folder / TEMPLATES).is_dir():
            shutil.copytree(folder / TEMPLATES, target / TEMPLATES)
        return AutoTokenizer.from_pretrained(target, trust_remote_code=False)
