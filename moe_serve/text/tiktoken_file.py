"""A tiktoken.model: tokens and their ranks. Python code beside it, and not the file, says how a text is cut before.

The known ones are here by the name of that code, which stays unread. Knows transformers' conversion and tiktoken, which
says whether the conversion is right; knows no chat.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from moe_serve.errors import ConfigError, one_line
from moe_serve.text.converted import add_tokens, fields_of, load_converted
from moe_serve.text.probes import PROBES

NAME = "tiktoken.model"
PACKAGE = "tiktoken"
RESERVED = 256
"""Ids behind the ranks; those that tokenizer_config.json does not name are reserved."""
UPPER, LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
MOONSHOT = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT_FORMS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT_FORMS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Chinese characters apart from other letters; words begin at capitals; three digits at most (Moonlight, Kimi)."""
PATTERNS: Mapping[str, str] = MappingProxyType(
    {"tokenization_moonshot.TikTokenTokenizer": MOONSHOT, "tokenization_kimi.TikTokenTokenizer": MOONSHOT}
)
"""By the class that `auto_map` names."""


def pattern_of(folder: Path) -> str | None:
    """How the folder's tiktoken.model cuts texts; None if there is no such file, or its code is unknown."""
    if not (folder / NAME).is_file():
        return None
    auto_map = fields_of(folder).get("auto_map")
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    return PATTERNS.get(str(named[0] if isinstance(named, list) and named else named))


def load(folder: Path, pattern: str) -> Any:
    """transformers' tokenizer. ConfigError: tiktoken is missing, the file is damaged, or the ids are not tiktoken's."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"{folder}: {NAME} is read by the package tiktoken, which is not installed; run `pip install tiktoken`"
        )
    fields = fields_of(folder)
    try:
        backend, ranks = _converted(folder / NAME, pattern, fields.get("added_tokens_decoder", {}))
    except Exception as error:  # tokenizers raises Exception itself
        raise ConfigError(f"{folder / NAME}: cannot be read as a tiktoken file ({one_line(error)})") from error
    hf = load_converted(backend, folder, fields)
    _compare(hf, ranks, pattern, folder)
    return hf


def _converted(file: Path, pattern: str, added: Mapping[str, Any]) -> tuple[Tokenizer, dict[bytes, int]]:
    converter = TikTokenConverter(vocab_file=str(file), pattern=pattern)
    ranks = converter.load_tiktoken_bpe(converter.vocab_file)
    if not ranks:
        raise ValueError("it holds no tokens")
    backend = converter.converted()
    named = {int(number): token for number, token in added.items()}
    add_tokens(backend, [_token(number, named) for number in range(len(ranks), len(ranks) + RESERVED)])
    return backend, ranks


def _token(number: int, named: Mapping[int, Any]) -> tuple[str, bool]:
    if number not in named:
        return f"<|reserved_token_{number}|>", True
    return named[number]["content"], bool(named[number].get("special", True))


def _compare(hf: Any, ranks: dict[bytes, int], pattern: str, folder: Path) -> None:
    from tiktoken import Encoding

    encoding = Encoding(folder.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    if any(hf(text, add_special_tokens=False)["input_ids"] != encoding.encode_ordinary(text) for text in PROBES):
        raise ConfigError(f"{folder / NAME}: transformers and tiktoken make other tokens of this vocabulary")
