"""A SentencePiece-like decoder drops a text's first space. An answer is not the beginning of its text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer

SPACE = "\u2581"
PROMPTS = ["The", "The cat", "a", "", "é", "The " * 20]
ANSWER = ["▁L", "▁F", "e", "▁", "<0xC3>", "<0xA9>", "▁P"]


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Letters, byte fallback, and a decoder that strips one space from the front."""
    folder = tmp_path_factory.mktemp("llama")
    letters = [chr(code) for code in range(65, 123) if chr(code).isalpha()]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), SPACE, *letters]
    words += [SPACE + letter for letter in letters]
    merges = [(SPACE, letter) for letter in letters]
    vocab = {word: i for i, word in enumerate(words)}
    backend = FastTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_path(str(Path(folder)))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("with_start", [False, True])
def test_the_text_is_that_of_both_less_the_prompt(llama_like: Tokenizer, prompt: str, with_start: bool) -> None:
    ids = [*([1] if with_start else []), *llama_like.encode(prompt, add_special_tokens=False)]
    answer = [llama_like.backend.get_vocab()[word] for word in ANSWER]
    detokenizer = IncrementalDetokenizer(llama_like, SamplingParams(), ids)
    text = "".join(detokenizer.push([token])[0] for token in answer) + detokenizer.flush()
    assert text == llama_like.decode([*ids, *answer]).removeprefix(llama_like.decode(ids))
    if prompt:
        assert text == " L Fe é P"
