"""The files of a checkpoint's tokenizer and chat template: which are read, and the true reason where one is not.

transformers tries one format after another, and its message names the last one that it tried. Knows names and JSON;
loads no tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from moe_serve.errors import ConfigError
from moe_serve.gguf_files.folder import NO_TOKENIZER

READABLE = ("tokenizer.json", "tokenizer.model", "vocab.json")
WHOLE = "tokenizer.json"
INSTEAD = "give a folder with a tokenizer.json by --tokenizer, such as that of the model it was made from"
PROCESSORS_TEMPLATE = "chat_template.json"
"""Where processors of images and text keep what tokenizers keep in chat_template.jinja."""


def refuse_unreadable(folder: str) -> None:
    """ConfigError where the folder's tokenizer is none that transformers reads without its code."""
    path = Path(folder)
    if (path / WHOLE).is_file():
        return
    if has_own_code(path):
        raise ConfigError(
            f"{folder}: its tokenizer is Python code of its own (auto_map in tokenizer_config.json);"
            f" --trust-remote-code runs it, or {INSTEAD}"
        )
    if not any((path / name).is_file() for name in READABLE):
        raise ConfigError(_reason_for_none(path))
    if (path / "tokenizer.model").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise ConfigError(
            f"{folder}: tokenizer.model is read by the package sentencepiece, which is not installed; run `pip install"
            f" sentencepiece`, or {INSTEAD}"
        )


def _reason_for_none(path: Path) -> str:
    if (note := path / NO_TOKENIZER).is_file():
        return note.read_text(encoding="utf-8")
    if any(path.glob("*tiktoken*")):
        return f"{path}: a tiktoken file does not say how a text is cut before it, and no code here is named; {INSTEAD}"
    # transformers would make up an empty one
    return f"{path}: no tokenizer here ({', '.join(READABLE)}); see --tokenizer"


def has_own_code(path: Path) -> bool:
    """Whether the tokenizer's class is Python code in the folder."""
    try:
        fields = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    auto_map = fields.get("auto_map") if isinstance(fields, dict) else None
    return bool(auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map)


def processors_template(folder: str) -> str | None:
    """The chat template in chat_template.json, which transformers reads for processors only."""
    path = Path(folder) / PROCESSORS_TEMPLATE
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON with a chat_template ({type(error).__name__})") from error
    if not isinstance(template, str):
        raise ConfigError(f"{path}: chat_template must be text")
    return template
