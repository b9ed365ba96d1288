"""A checkpoint whose tokenizer is a tokenizer.model alone: the ids are SentencePiece's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import ConfigError
from moe_serve.text.tokenizer import Tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="the extra `sentencepiece` is not installed")
SENTENCES = ["the cat sat on the mat", "The Hat of 1234 cats, naïve", "def f(x):", "a b c"] * 20


def trained(folder: Path, **options: Any) -> Any:
    """A small vocabulary with bytes for what it lacks, in `folder` as a checkpoint has it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("text", ["the cat", "  two  spaces\n", "5 naïve 你好 👩", "Hello, world!"])
def test_ids_and_text_are_those_of_the_model_file(tmp_path: Path, text: str) -> None:
    processor = trained(tmp_path)
    tokenizer = Tokenizer.from_path(str(tmp_path))
    ids = tokenizer.encode(text)
    assert ids == [processor.bos_id(), *processor.encode(text)]
    assert tokenizer.hf.decode(ids, skip_special_tokens=True) == text


def test_a_model_file_that_changes_texts_otherwise_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, remove_extra_whitespaces=True)
    with pytest.raises(ConfigError, match=r"tokenizer.model: transformers and sentencepiece make other tokens"):
        Tokenizer.from_path(str(tmp_path))
