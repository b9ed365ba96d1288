"""Grammars: output that must be JSON of a schema, match a regular expression, or follow a Lark grammar.

llguidance decides which tokens may come next; here its tokenizer is made, grammars are compiled once,
and the masks of a step are computed on a thread of their own while the model runs. Knows token ids
and llguidance; knows no logits and no HTTP.

Shape alphabet: R rows (sequences with a grammar in this step), V vocabulary.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal

import llguidance.hf
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec, Sequence
from moe_serve.text.tokenizer import Tokenizer

CACHED_GRAMMARS = 128
JSON_WHITESPACE = r"\n?[ ]{0,16}"
"""Between two JSON tokens at most a line break and its indentation: a model cannot lose itself in spaces."""

MAX_MULTIPLE = 100_000
"""llguidance builds an automaton with one state for each remainder: 100,000 take a second and 40 MB."""
MULTIPLE_OF = re.compile(r'"multipleOf"\s*:\s*([-+.0-9eE]+)')


class GrammarError(Exception):
    """A grammar that ran into llguidance's limits while it was used."""


class Matcher:
    """How far one sample has come in its grammar. Catches up with the sampled tokens by itself."""

    def __init__(self, begin: Callable[[], LLMatcher]) -> None:
        """`begin`: the grammar before its first token; called when a mask is first wanted."""
        self._begin = begin
        self._matcher: LLMatcher | None = None
        self._num_consumed = 0

    def fill(self, seq: Sequence, row: NDArray[np.int32]) -> None:
        """Write the tokens that may follow into `row`, one bit per token id; GrammarError if that failed."""
        matcher = self._matcher = self._matcher or self._begin()
        new = seq.token_ids[seq.num_prompt + self._num_consumed :]
        if new:
            matcher.consume_tokens(new)
            self._num_consumed += len(new)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())


class Grammars:
    """Compiles grammars for one tokenizer and remembers the last ones. Safe to call from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._lock = threading.Lock()
        """Of the cache, held for moments."""
        self._tokenizer_lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()

    def check(self, spec: GrammarSpec) -> None:
        """Compile, up to a tenth of a second; InvalidRequestError names spec.param and says what is wrong."""
        self._get(spec)

    def start(self, spec: GrammarSpec) -> Matcher:
        """The grammar before its first token. Errors of `check` apply."""
        fresh = self._copy(spec)
        return Matcher(lambda: fresh)

    def start_later(self, spec: GrammarSpec) -> Matcher:
        """As `start`, compiled when the first mask is wanted: for a grammar that somebody else has checked."""

        def begin() -> LLMatcher:
            try:
                return self._copy(spec)
            except InvalidRequestError as error:
                raise GrammarError(error.message) from error

        return Matcher(begin)

    def _copy(self, spec: GrammarSpec) -> LLMatcher:
        fresh = self._get(spec)
        with self._lock:
            return fresh.deep_copy()

    def _get(self, spec: GrammarSpec) -> LLMatcher:
        """Compiled without holding the lock: the engine must not wait for another request's grammar."""
        with self._lock:
            found = self._compiled.pop(spec, None)
        found = found or self._compile(spec)
        with self._lock:
            self._compiled[spec] = found
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        if not self._eos:
            raise InvalidRequestError(spec.param, f"{spec.param}: this model has no end token to stop at")
        _check_multiples(spec)
        try:
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(self._ll(), _text_of(spec), log_level=0, limits=limits)
        except Exception as error:  # the converters raise ValueError, GbnfToLarkError and RecursionError
            raise InvalidRequestError(spec.param, f"{spec.param}: {error}") from error
        if matcher.is_error():
            raise InvalidRequestError(spec.param, f"{spec.param}: {matcher.get_error()}")
        return matcher

    def _ll(self) -> LLTokenizer:
        """Made on first use: a vocabulary of 150,000 takes about a second."""
        with self._tokenizer_lock:
            if self._ll_tokenizer is None:
                size = max(self._vocab_size, self._tokenizer.vocab_size)
                eos = sorted(self._eos)
                self._ll_tokenizer = llguidance.hf.from_tokenizer(self._tokenizer.hf, n_vocab=size, eos_token=eos)
            return self._ll_tokenizer


def _check_multiples(spec: GrammarSpec) -> None:
    """Refuse a `multipleOf`, or several together, that would cost gigabytes to compile."""
    factors = {_significand(text) for text in MULTIPLE_OF.findall(spec.text)}
    if math.lcm(*factors) > MAX_MULTIPLE:
        raise InvalidRequestError(
            spec.param, f"{spec.param}: the least common multiple of all multipleOf must not exceed {MAX_MULTIPLE}"
        )


def _significand(number: str) -> int:
    """The number without its point: 25 for 0.25, 300 for 3e2; 1 for what is no number."""
    try:
        _, digits, exponent = Decimal(number).as_tuple()
    except ArithmeticError:
        return 1
    zeros = min(max(int(exponent), 0), len(str(MAX_MULTIPLE)))
    return int("".join(map(str, digits))) * 10**zeros or 1


def _text_of(spec: GrammarSpec) -> str:
    if spec.kind is GrammarKind.JSON_SCHEMA:
        return LLMatcher.grammar_from_json_schema(spec.text, overrides={"whitespace_pattern": JSON_WHITESPACE})
    if spec.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(spec.text)
    is_gbnf = spec.kind is GrammarKind.GBNF
    return LLMatcher.grammar_from_lark(gbnf_to_lark(spec.text) if is_gbnf else spec.text)


# ---- masks of one step ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Masks:
    """The tokens that the grammars of one step allow."""

    rows: list[int]
    """[R] rows of the logits that are constrained."""
    bits: NDArray[np.int32]
    """[R, >= V / 32], bit `t % 32` of word `t // 32` set when token t may come next."""
    errors: dict[Sequence, str]
    """Sequences whose grammar gave up; their rows are left out."""


class MaskThread:
    """Computes masks beside the forward pass: llguidance lets go of the GIL."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._pool = ThreadPoolExecutor(1, "moe-serve-masks")

    def start(self, seqs: Rows[Sequence]) -> Future[Masks] | None:
        """Begin with the masks of those rows of `seqs` that have a grammar; None when there are none."""
        rows = [i for i, s in enumerate(seqs) if s.matcher is not None]
        return self._pool.submit(compute_masks, seqs, rows, self._num_words) if rows else None

    def close(self) -> None:
        self._pool.shutdown()


def compute_masks(seqs: Rows[Sequence], rows: list[int], num_words: int) -> Masks:
    """Masks of `seqs[i]` for i in `rows`, each `num_words` words of 32 tokens."""
    kept: list[int] = []
    errors: dict[Sequence, str] = {}
    bits = np.zeros((len(rows), num_words), np.int32)
    for i in rows:
        matcher = seqs[i].matcher
        assert isinstance(matcher, Matcher)
        try:
            matcher.fill(seqs[i], bits[len(kept)])
            kept.append(i)
        except GrammarError as error:
            errors[seqs[i]] = f"the grammar could not be followed further: {error}"
    return Masks(kept, bits[: len(kept)], errors)
