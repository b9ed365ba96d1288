"""The incremental detokenizer against decoding everything at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer
from tests.fuzz import fuzz_detokenizer

TEXT = st.text(max_size=40) | st.text("abcde 你🙂é", max_size=40)
BROKEN = "\N{REPLACEMENT CHARACTER}"
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def llama_like() -> Tokenizer:
    return fuzz_detokenizer.llama_like()


def deltas(tokenizer: Tokenizer, ids: list[int], **params: Any) -> tuple[str, str | None]:
    """What a client sees of these ids, token by token."""
    detokenizer, shown = IncrementalDetokenizer(tokenizer, SamplingParams(**params)), ""
    for token_id in ids:
        text, stop = detokenizer.push([token_id])
        shown += text
        if stop is not None:
            return shown, stop
    return shown + detokenizer.flush(), None


@few
@given(text=TEXT)
def test_deltas_of_any_text_add_up(tokenizer: Tokenizer, llama_like: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert deltas(tokenizer, ids) == (text, None)
    llama_ids = llama_like.encode(text, add_special_tokens=False)
    assert deltas(llama_like, llama_ids) == (llama_like.decode(llama_ids), None)


@few
@given(data=st.data(), skip=st.booleans())
def test_deltas_of_random_tokens_add_up(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert deltas(tokenizer, ids, skip_special_tokens=skip)[0] == tokenizer.decode(ids, skip)


@few
@given(data=st.data(), skip=st.booleans())
def test_deltas_of_random_llama_tokens_add_up(llama_like: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, llama_like.vocab_size - 1), max_size=30))
    shown, whole = deltas(llama_like, ids, skip_special_tokens=skip)[0], llama_like.decode(ids, skip)
    if BROKEN not in whole:
        assert shown == whole


def test_text_goes_on_after_bytes_that_are_no_character(llama_like: Tokenizer) -> None:
    ids = [3 + 0x41, 3 + 0x80, *llama_like.encode(" a bc", add_special_tokens=False)[1:]]
    assert deltas(llama_like, ids)[0].startswith("A" + BROKEN)
    assert deltas(llama_like, ids)[0].endswith(" bc")


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The truth about stop strings: the first to be complete ends the text, the longer of two."""
    found = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if not found:
        return text, None
    end, start, stop = min(found)
    return text[: end if include else start], stop


@few
@given(
    text=st.text("abc ", max_size=40) | TEXT,
    stops=st.lists(st.text("abc ", min_size=1, max_size=5) | st.sampled_from(["你🙂", "é"]), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(
    tokenizer: Tokenizer, llama_like: Tokenizer, text: str, stops: list[str], include: bool
) -> None:
    params = {"stop": tuple(stops), "include_stop_str_in_output": include}
    assert deltas(tokenizer, tokenizer.encode(text), **params) == cut(text, stops, include)
    ids = llama_like.encode(text, add_special_tokens=False)
    assert deltas(llama_like, ids, **params) == cut(llama_like.decode(ids), stops, include)


def test_text_comes_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(stop=("lazy cat",)))
    first = [detokenizer.push([i])[0] for i in tokenizer.encode("the lazy ")]
    assert "".join(first) == "the "
    assert "".join(detokenizer.push([i])[0] for i in tokenizer.encode("dog")) == "lazy dog"


def test_half_a_character_is_shown_at_the_end_only(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams())
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert detokenizer.push(ids[:-1]) == ("", None)
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""
