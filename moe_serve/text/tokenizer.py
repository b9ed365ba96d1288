"""Tokenizer: text to token ids and back, and conversations through the model's chat template.

A thin face on transformers' fast tokenizers, so that the rest of the code sees five methods.
Knows no requests and no HTTP.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jinja2
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError, ContextTooLongError, InvalidRequestError
from moe_serve.text import tokenizer_files
from moe_serve.text.tokenizer_loading import load_tokenizer

Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """One checkpoint's tokenizer."""

    def __init__(self, hf: PreTrainedTokenizerFast) -> None:
        self.hf = hf
        """The transformers object, for libraries that take one."""
        self.backend: FastTokenizer = hf.backend_tokenizer
        """The tokenizers library's object, for DecodeStream."""
        self._byte_of = _byte_level_alphabet() if _is_byte_level(self.backend) else None
        self._added = {i: t.content for i, t in self.backend.get_added_tokens_decoder().items()}
        self._space = "\u2581" if "\u2581" in repr(self.backend.decoder) else None
        """The character that stands for a space in a SentencePiece vocabulary."""
        self._longest_token_chars = max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)
        """A character of a text is at least one of a token, even where tokens are written in bytes."""

    @staticmethod
    def from_config(config: EngineConfig) -> Tokenizer:
        """Load what the settings name. ConfigError says what is wrong."""
        return Tokenizer.from_path(config.tokenizer or config.model, config.chat_template, config.trust_remote_code)

    @staticmethod
    def from_path(folder: str, chat_template_file: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
        """Load from a checkpoint folder; `chat_template_file` replaces its chat template."""
        hf = load_tokenizer(folder, trust_remote_code)
        if chat_template_file is not None:
            path = Path(chat_template_file)
            if not path.is_file():
                raise ConfigError(f"--chat-template: no file {chat_template_file}")
            hf.chat_template = path.read_text()
        elif not hf.chat_template:
            hf.chat_template = tokenizer_files.processors_template(folder)
        return Tokenizer(cast(PreTrainedTokenizerFast, hf))

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; added tokens included."""
        return len(self.hf)

    @property
    def eos_token_ids(self) -> set[int]:
        return set() if self.hf.eos_token_id is None else {int(self.hf.eos_token_id)}

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids. ContextTooLongError (prompt), by its length alone: a text that cannot be `max_tokens` or fewer."""
        self._check_length(text, max_tokens)
        return list(self.hf(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        if max_tokens is not None and len(text) > max_tokens * self._longest_token_chars:
            message = f"the text has {len(text)} characters, which cannot be {max_tokens} tokens or fewer"
            raise ContextTooLongError("prompt", message)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation. InvalidRequestError (messages): the template refuses it, or as in `encode`."""
        if not self.hf.chat_template:
            raise InvalidRequestError(
                "messages", "this model has no chat template; use /v1/completions or start with --chat-template FILE"
            )
        taken = sorted(_template_arguments() & set(chat_template_kwargs or ()))
        if taken:  # among them chat_template itself: a client must not bring code
            raise InvalidRequestError("chat_template_kwargs", f"chat_template_kwargs cannot set {taken[0]}")
        try:
            text = self.hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequestError("messages", f"the chat template cannot render these messages: {error}") from error
        return self.encode(str(text), add_special_tokens=False, max_tokens=max_tokens)

    def is_byte(self, token_id: int) -> bool:
        """Whether a token stands for one byte of a character that the vocabulary lacks."""
        return _is_byte_piece(self.backend.id_to_token(token_id) or "")

    def token_text(self, token_id: int) -> str:
        """The token on its own; half of a UTF-8 character shows as U+FFFD."""
        return bytes(self.token_bytes(token_id)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> list[int]:
        """The token's UTF-8 bytes, exact even for half a character (OpenAI's `bytes`)."""
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return []
        if token_id in self._added:
            return list(self._added[token_id].encode())
        if self._byte_of is not None and all(c in self._byte_of for c in piece):
            return [self._byte_of[c] for c in piece]
        if _is_byte_piece(piece):
            return [int(piece[3:5], 16)]
        if self._space is not None:
            return list(piece.replace(self._space, " ").encode())
        return list(self.backend.decode([token_id], skip_special_tokens=False).encode())


@lru_cache(maxsize=1)
def _template_arguments() -> frozenset[str]:
    """Names that apply_chat_template takes for itself, so that they cannot be variables of a template."""
    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def _is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _is_byte_level(backend: FastTokenizer) -> bool:
    return "ByteLevel" in repr(backend.decoder)


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level alphabet: printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
