"""text_offset of completions: where each token's text begins in the text that the client gets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.server.app import create_app
from moe_serve.text.detokenizer import IncrementalDetokenizer, token_starts
from moe_serve.text.tokenizer import Tokenizer
from tests.fuzz.fuzz_detokenizer import llama_like
from tests.random_model import RandomRunner, random_engine

TEXT = "A fox é 你好 🙂!"


def scripted(tokenizer: Tokenizer, script: list[int], **body: Any) -> dict[str, Any]:
    """The one choice of an answer that says `script`."""
    engine = random_engine(tokenizer)
    assert isinstance(engine.runner, RandomRunner)
    engine.runner.script = script
    app = create_app(AsyncEngine(engine), tokenizer, model_name="m")
    fields = {"prompt": [5, 6, 7], "temperature": 0, "logprobs": 0, "max_tokens": len(script), "ignore_eos": True}

    async def ask() -> httpx.Response:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post("/v1/completions", json={**fields, **body})

    response = asyncio.run(ask())
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_tokens_that_share_a_character_begin_with_it(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = [tokenizer.token_text(i) for i in script]
    assert any("\ufffd" in piece for piece in pieces), "some characters are split"
    choice = scripted(tokenizer, script)
    assert choice["text"] == TEXT
    offsets = choice["logprobs"]["text_offset"]
    for piece, start in zip(pieces, offsets, strict=True):
        whole = piece.split("\ufffd")[0]
        assert TEXT[start : start + len(whole)] == whole
    assert offsets[-1] == len(TEXT) - len(pieces[-1])


def test_special_tokens_take_no_place(tokenizer: Tokenizer) -> None:
    (eos, *_) = sorted(tokenizer.eos_token_ids)
    fox, dog = (tokenizer.encode(word, add_special_tokens=False) for word in ("fox", " dog"))
    choice = scripted(tokenizer, [*fox, eos, eos, *dog])
    assert choice["text"] == "fox dog"
    first, *_ = choice["logprobs"]["text_offset"][len(fox) + 2 :]
    assert choice["logprobs"]["text_offset"][len(fox) : len(fox) + 3] == [3, 3, first]
    assert first == 3


def test_special_tokens_that_are_shown_take_theirs(tokenizer: Tokenizer) -> None:
    (eos, *_) = sorted(tokenizer.eos_token_ids)
    fox = tokenizer.encode("fox", add_special_tokens=False)
    choice = scripted(tokenizer, [eos, *fox], skip_special_tokens=False)
    assert choice["text"] == tokenizer.token_text(eos) + "fox"
    assert choice["logprobs"]["text_offset"][1] == len(tokenizer.token_text(eos))


def test_an_echoed_prompt_is_counted_as_it_is_shown(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXT)
    script = tokenizer.encode(" dog", add_special_tokens=False)
    choice = scripted(tokenizer, script, prompt=prompt, echo=True)
    assert choice["text"] == TEXT + " dog"
    assert choice["logprobs"]["text_offset"][: len(prompt)] == token_starts(tokenizer, prompt)
    assert choice["logprobs"]["text_offset"][len(prompt)] == len(TEXT)


@pytest.mark.parametrize("make", [llama_like, lambda: Tokenizer.from_path(str(Path("moe_serve/demo/model")))])
def test_a_character_that_breaks_off_has_a_place_of_its_own(make: Any) -> None:
    tokenizer: Tokenizer = make()
    vocab = tokenizer.backend.get_vocab()
    lead = vocab["<0xC3>"] if "<0xC3>" in vocab else vocab["Ã"]  # the first byte of é, as each vocabulary writes it
    (letter,) = tokenizer.encode("e", add_special_tokens=False)[-1:]
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(), [letter])
    starts, text = [], ""
    for token in (letter, lead, letter):
        text += detokenizer.push([token])[0]
        starts.append(detokenizer.token_start)
    assert text + detokenizer.flush() == "e\ufffde"
    assert starts == [0, 1, 2]


def test_the_first_space_counts(tokenizer: Tokenizer) -> None:
    like_llama = llama_like()
    vocab = like_llama.backend.get_vocab()
    detokenizer = IncrementalDetokenizer(like_llama, SamplingParams(), [vocab["a"]])
    starts = []
    for piece in ("▁a", "▁bc", "de"):
        detokenizer.push([vocab[piece]])
        starts.append(detokenizer.token_start)
    assert starts == [0, 2, 5]
