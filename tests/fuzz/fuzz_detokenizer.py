"""Fuzz the incremental detokeniser: any tokens, stop strings and steps, against decoding all at once.

    python tests/fuzz/fuzz_detokenizer.py --minutes 10

Two vocabularies: the demo's byte-level BPE, and one with SentencePiece spaces and byte fallback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer
from tests.fuzz.harness import demo_tokenizer, fuzz_for_minutes

BROKEN = "\N{REPLACEMENT CHARACTER}"
LETTERS = "ab de 你🙂é\n\0"
TEXT = st.text(max_size=60) | st.text(LETTERS, max_size=60)
STOPS = st.lists(st.text(min_size=1, max_size=6) | st.text(LETTERS, min_size=1, max_size=4), max_size=16)


def llama_like() -> Tokenizer:
    """Pieces with a leading space, single bytes for the rest, and special tokens: Llama's and Mixtral's scheme."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdeé", "▁a", "▁bc", "de", "▁▁"]
    merges = [("▁", "a"), ("d", "e"), ("▁", "▁")]
    bpe = models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = FastTokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def first_stop(text: str, stops: tuple[str, ...] | str, include: bool) -> tuple[str, str | None]:
    """The truth about stop strings: the first to be complete ends the text, the longer of two."""
    found = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if not found:
        return text, None
    end, start, stop = min(found)
    return text[: end if include else start], stop


def shown(tokenizer: Tokenizer, ids: list[int], sizes: list[int], params: SamplingParams) -> tuple[str, str | None]:
    """What a client sees when the ids come in steps of these sizes (then one by one)."""
    detokenizer, text, start = IncrementalDetokenizer(tokenizer, params), "", 0
    for size in [*sizes, *[1] * len(ids)]:
        delta, stop = detokenizer.push(ids[start : start + size])
        text, start = text + delta, start + size
        if stop is not None:
            return text, stop
    text += detokenizer.flush()
    assert detokenizer.flush() == "", "nothing is shown twice"
    return text, None


def check(tokenizer: Tokenizer, ids: list[int], sizes: list[int], params: SamplingParams, is_exact: bool) -> None:
    text, stop = shown(tokenizer, ids, sizes, params)
    text.encode()  # no half of a surrogate pair
    whole = tokenizer.decode(ids, params.skip_special_tokens)
    if is_exact or BROKEN not in whole:
        assert (text, stop) == first_stop(whole, params.stop, params.include_stop_str_in_output)


def run(tokenizer: Tokenizer, is_exact: bool, seed: int, examples: int) -> int:
    """Fuzz one vocabulary. `is_exact`: broken UTF-8 too must come out as decoding at once shows it."""
    count = 0
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60)
    from_text = TEXT.map(lambda t: tokenizer.encode(t, add_special_tokens=False))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=_PHASES
    )
    @given(ids=ids | from_text, sizes=st.lists(st.integers(0, 5), max_size=30), more=_params())
    def example(ids: list[int], sizes: list[int], more: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        check(tokenizer, ids, sizes, SamplingParams(**more), is_exact)

    example()
    return count


_PHASES = (Phase.generate, Phase.shrink)


def _params() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "stop": STOPS.map(tuple),
            "include_stop_str_in_output": st.booleans(),
            "skip_special_tokens": st.booleans(),
        }
    )


def properties() -> dict[str, Any]:
    byte_level, llama = demo_tokenizer(), llama_like()
    return {
        "byte_level": lambda seed, n: run(byte_level, True, seed, n),
        "byte_fallback": lambda seed, n: run(llama, False, seed, n),
    }


if __name__ == "__main__":
    fuzz_for_minutes(properties())
