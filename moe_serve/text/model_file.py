"""A tokenizer.model of SentencePiece: transformers reads it, and SentencePiece itself says whether it read it right.

transformers can leave out the space that a model file puts before every text. Other tokens would follow without a word.
Knows both libraries; knows no chat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import decoders, normalizers

from moe_serve.errors import ConfigError
from moe_serve.text.probes import PROBES

NAME = "tokenizer.model"
SPACE = "\u2581"


def agree_with_sentencepiece(hf: Any, file: Path) -> None:
    """Give `hf`, made from `file`, the leading space that the file asks for. ConfigError: its ids still differ."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(file))
    if _agrees(hf, processor):
        return
    backend = hf.backend_tokenizer
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if not _agrees(hf, processor):
        raise ConfigError(
            f"{file}: transformers and sentencepiece make other tokens of this vocabulary; give a folder with a"
            " tokenizer.json by --tokenizer"
        )


def _agrees(hf: Any, processor: Any) -> bool:
    return all(hf(text, add_special_tokens=False)["input_ids"] == processor.encode(text) for text in PROBES)
