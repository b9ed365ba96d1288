"""A tokenizer that is Python code in the checkpoint's folder, run only where the user said so.

Grammars and streaming need a vocabulary of the tokenizers library. Code that calls tiktoken has such a vocabulary
inside. It is converted and then compared with the code itself. Knows no chat.
"""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from moe_serve.errors import ConfigError, one_line
from moe_serve.text import tiktoken_file
from moe_serve.text.converted import add_tokens, fields_of, load_converted
from moe_serve.text.probes import PROBES

log = logging.getLogger(__name__)


def load(folder: Path) -> Any:
    """transformers' fast tokenizer. ConfigError: the code fails, or what it makes cannot be converted."""
    log.warning("--trust-remote-code: the tokenizer's Python code in %s runs now, with all rights of this user", folder)
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, mistral_format=False)
    except Exception as error:  # code of others
        raise ConfigError(f"{folder}: the tokenizer's own code fails ({one_line(error)})") from error
    if own.is_fast:
        return own
    encoding = _tiktoken_in(own)
    if encoding is None:
        raise ConfigError(
            f"{folder}: the tokenizer's own code is neither a fast tokenizer nor made of tiktoken; give a folder with a"
            " tokenizer.json by --tokenizer"
        )
    hf = load_converted(_converted(encoding, own), folder, fields_of(folder))
    if any(hf(text, add_special_tokens=False)["input_ids"] != _ids(own, text) for text in PROBES):
        raise ConfigError(f"{folder}: the tokenizer's own code makes other tokens than tiktoken's vocabulary in it")
    return hf


def _ids(own: Any, text: str) -> list[int]:
    return list(own(text, add_special_tokens=False)["input_ids"])


def _tiktoken_in(own: Any) -> Any:
    """The tiktoken.Encoding that the code keeps, or None."""
    try:
        from tiktoken import Encoding
    except ImportError:
        return None
    return next((value for value in vars(own).values() if isinstance(value, Encoding)), None)


def _converted(encoding: Any, own: Any) -> Tokenizer:
    with TemporaryDirectory() as place:
        file = Path(place) / tiktoken_file.NAME
        ranks = encoding._mergeable_ranks.items()
        file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
        backend = TikTokenConverter(vocab_file=str(file), pattern=encoding._pat_str).converted()
    known = own.added_tokens_decoder
    for text, number in sorted(encoding._special_tokens.items(), key=lambda item: item[1]):
        add_tokens(backend, [(text, number not in known or bool(known[number].special))])
        if backend.token_to_id(text) != number:
            raise ConfigError(f"special token {text!r} has id {number}, which does not follow the vocabulary's")
    return backend
