"""Prompts for bench_engine.py: never the same one twice, so that no prefix cache can help."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

FIRST_ORDINARY_ID = 3
"""Below are the demo tokenizer's special tokens."""


class PromptSource:
    """Token lists of a wanted length: random ids, or random windows of a text."""

    def __init__(self, model: str, text: Path | None, seed: int) -> None:
        self._random = random.Random(seed)
        self._vocab = AutoConfig.from_pretrained(model).vocab_size
        self._text = AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"] if text else None

    def draw(self, count: int, length: int) -> list[list[int]]:
        """`count` fresh prompts of `length` tokens."""
        return [self._one(length) for _ in range(count)]

    def _one(self, length: int) -> list[int]:
        if self._text is None:
            return [self._random.randrange(FIRST_ORDINARY_ID, self._vocab) for _ in range(length)]
        start = self._random.randrange(len(self._text) - length)
        return list(self._text[start : start + length])
