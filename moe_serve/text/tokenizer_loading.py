"""Which of a folder's files its tokenizer is read from: tokenizer.json, tiktoken, tekken, SentencePiece, or code.

Knows the readers; knows no chat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

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
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
    except Exception as error:  # tokenizers raises Exception itself, transformers what a wrong field leads to
        raise ConfigError(f"{folder}: cannot load its tokenizer ({one_line(error)})") from error
    if not hf.is_fast:
        raise ConfigError(f"{folder}: needs a tokenizer.json; convert the slow tokenizer with transformers first")
    if not (folder / tokenizer_files.WHOLE).is_file() and (file := folder / model_file.NAME).is_file():
        model_file.agree_with_sentencepiece(hf, file)
    return hf
