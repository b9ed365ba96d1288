"""Which of a folder's files its tokenizer is read from: tokenizer.json, tiktoken, tekken, SentencePiece, or code.

Knows the readers; knows no chat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

from moe_serve.config.model_folder import CONFIG, read_object
from moe_serve.errors import ConfigError, one_line
from moe_serve.text import model_file, remote_code, tekken_file, tiktoken_file, tokenizer_files


def load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """transformers' fast tokenizer of a checkpoint folder. ConfigError says what is wrong.

    `trust_remote_code`: Python code in the folder may run, where nothing else reads the tokenizer.
    """
    path = Path(folder)
    if not (path / tokenizer_files.WHOLE).is_file():
        if (pattern := tiktoken_file.pattern_of(path)) is not None:
            return tiktoken_file.load(path, pattern)
        if trust_remote_code and tokenizer_files.has_own_code(path):
            return remote_code.load(path)
        if (tekken := tekken_file.find(path)) is not None:
            return tekken_file.load(tekken)
    tokenizer_files.refuse_unreadable(folder)
    return _by_transformers(path)


def _by_transformers(folder: Path) -> Any:
    try:  # mistral_format: a tekken.json beside a tokenizer.json would give a tokenizer without a fast vocabulary
        hf = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, mistral_format=False, **_config_where_unknown(folder)
        )
    except Exception as error:  # tokenizers raises Exception itself, transformers what a wrong field leads to
        raise ConfigError(f"{folder}: cannot load its tokenizer ({one_line(error)})") from error
    if not hf.is_fast:
        raise ConfigError(f"{folder}: needs a tokenizer.json; convert the slow tokenizer with transformers first")
    if not (folder / tokenizer_files.WHOLE).is_file() and (file := folder / model_file.NAME).is_file():
        model_file.agree_with_sentencepiece(hf, file)
    return hf


def _config_where_unknown(folder: Path) -> dict[str, Any]:
    """A neutral config for a model_type that transformers does not know, whose fields it may refuse."""
    file = folder / CONFIG
    model_type = read_object(file).get("model_type") if file.is_file() else None
    return {} if model_type is None or model_type in CONFIG_MAPPING else {"config": PreTrainedConfig()}
