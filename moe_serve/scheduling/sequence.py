"""What a client asked for (Request, SamplingParams) and its running state (Sequence).

Plain Python: no torch, no tokenizer, no HTTP. Scheduler tests import this in milliseconds.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol

from moe_serve.errors import InvalidRequestError, MoEServeError
from moe_serve.scheduling.field_types import kept_values
from moe_serve.scheduling.finish import FinishedStats, FinishReason
from moe_serve.scheduling.seats import NO_SEAT

NO_BIAS: Mapping[int, float] = MappingProxyType({})


class Closeable(Protocol):
    """What a sequence holds and gives back when it has ended."""

    def close(self) -> None: ...


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    """In llguidance's dialect."""
    GBNF = "gbnf"
    """llama.cpp's notation."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an output must look like from its first to its last character."""

    kind: GrammarKind
    text: str
    """A JSON schema (as JSON), a regular expression, or a grammar."""
    param: str = "grammar"
    """The request field that it came from, for errors about it."""


def _require(ok: bool, param: str, message: str) -> None:
    if not ok:
        raise InvalidRequestError(param, f"{param} {message}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens of one request are chosen. Field names are vLLM's.

    Raises InvalidRequestError naming the field when a value is out of range.
    """

    n: int = 1
    max_tokens: int | None = None
    """Completion length limit in tokens. None, the default: up to the end of the context window (vLLM: 16). 0: only the
    prompt is computed."""
    min_tokens: int = 0
    """No end-of-sequence or stop token is sampled before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 switches it off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: NO_BIAS)
    """Added to the logits of these token ids, each in [-100, 100]."""
    seed: int | None = None
    """Same seed, prompt and parameters: same tokens, in any batch."""
    stop: tuple[str, ...] | str = ()  # a string is one of them; kept as a tuple
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: GrammarSpec | None = None
    """Only tokens that keep the output within the grammar are sampled; when it is complete, only the end
    token. Where the grammar leaves nothing else it wins over min_tokens, bad_words and allowed_token_ids."""
    allowed_token_ids: tuple[int, ...] = ()
    """When not empty, nothing else is sampled."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences whose last token is never sampled after the others."""
    logprobs: int | None = None
    """None: none. k >= 0: the sampled token's log-probability and the k most likely beside it."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens; such a prompt is computed whole, without cached prefixes."""

    def __post_init__(self) -> None:
        for name, value in kept_values(self):
            object.__setattr__(self, name, value)
        _require(1 <= self.n <= 128, "n", f"must be between 1 and 128, got {self.n}")
        _require((self.max_tokens or 0) >= 0, "max_tokens", f"must not be negative, got {self.max_tokens}")
        _require(self.min_tokens >= 0, "min_tokens", f"must not be negative, got {self.min_tokens}")
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
        )
        self._check_ranges()
        self._check_stops()

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 1e4),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and low <= value <= high,
                name,
                f"must be between {low:g} and {high:g}, got {value}",
            )
        _require(0 < self.top_p <= 1, "top_p", f"must be above 0 and at most 1, got {self.top_p}")
        _require(self.top_k >= -1, "top_k", f"must be -1 (off), 0 (off) or positive, got {self.top_k}")
        _require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            f"must be above 0, got {self.repetition_penalty}",
        )
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit a signed 64-bit integer")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(count is None or 0 <= count <= 20, name, f"must be between 0 and 20, got {count}")
        for token_id, bias in self.logit_bias.items():
            _require(
                token_id >= 0 and math.isfinite(bias) and -100 <= bias <= 100,
                "logit_bias",
                f"maps token ids to values between -100 and 100, got {token_id}: {bias}",
            )

    def _check_stops(self) -> None:
        _require(len(self.stop) <= 16, "stop", f"takes at most 16 strings, got {len(self.stop)}")
        _require(all(self.stop), "stop", "must not contain an empty string")
        _require(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", "must not be negative")
        _require(all(t >= 0 for t in self.allowed_token_ids), "allowed_token_ids", "must not be negative")
        _require(all(self.bad_words), "bad_words", "must not contain an empty word")
        _require(
            self.grammar is None or not self.ignore_eos, "ignore_eos", "cannot be set with a grammar, which has an end"
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it; immutable once built."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time_s: float = 0.0
    """time.monotonic() when the request was accepted."""
    priority: int = 0
    """Among waiting requests, lower goes first; equals in order of arrival."""
    cache_salt: str = ""
    """Cached prefixes are shared only between requests of one salt (vLLM): no client can time what others asked."""
    client: str = ""
    """The API key or address that asked, if known: fair_shares.py shares steps between clients."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log, from the model's raw logits) of one token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token id, logprob) pairs, best first."""
    rank: int = 0
    """1 for the likeliest token; only known of prompt tokens."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request while it runs: n of them for SamplingParams.n = n.

    The whole life of a sequence is `num_computed` (tokens whose keys and values lie in KV pages)
    chasing `num_tokens` (prompt plus sampled tokens). A prefill, a chunk of one, a prefix-cache
    hit, a decode step and the recomputation after a preemption differ only in how far apart the
    two are. Example: prompt of 10, chunk of 8: num_computed 0 -> 8 -> 10 (samples token 11,
    num_tokens 11) -> 11 (samples token 12) ...
    """

    request: Request
    index: int
    """Which of the request's n samples this is."""
    token_ids: list[int]
    """Prompt, then sampled tokens."""
    max_total_tokens: int
    """Length at which it ends with FinishReason.LENGTH."""
    num_computed: int = 0
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when it was first scheduled."""
    num_loaded: int = 0
    """Of these, at most this many came from disk."""
    seat: int = NO_SEAT
    """Row of the recurrent layers' states while it runs (moe_serve/execution/state_cache.py)."""
    page_ids: MutableSequence[int] = field(default_factory=lambda: array("q"))
    """Its KV pages in order. An array where it grows: tensors are made of its memory, whatever its length."""
    page_hashes: list[bytes] = field(default_factory=list)
    """Prefix hash of each full page of token_ids known so far, in order."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of prompt tokens 1, 2, ... (nothing comes before token 0), as far as they are computed; sample 0 has them."""
    matcher: Closeable | None = None
    """A moe_serve.grammars.matcher.Matcher when the request has a grammar; closed when the sequence ends."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it, if any."""
    num_new: int = 0
    """Tokens that the last step it was in has given it."""
    num_preemptions: int = 0
    is_paused: bool = False
    """Its client does not read: it is not computed, and gives way where memory is short."""
    home_rank: int = 0
    """With several ranks, the one whose KV pages hold it (moe_serve/parallel)."""
    prefix_root: bytes = b""
    """Parent of the first page's hash: prefixes are shared only between sequences of one root."""
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def client(self) -> str:
        return self.request.client

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose log-probability is wanted and not there yet."""
        if self.params.prompt_logprobs is None or self.index > 0:
            return 0
        return self.num_prompt - 1 - len(self.prompt_logprobs)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def drop_newest(self, count: int) -> None:
        """Take back the last `count` of its new tokens: a stop string ended it before them."""
        if count:
            del self.token_ids[-count:], self.logprobs[len(self.logprobs) - count if self.logprobs else 0 :]
            self.num_new -= count
            self.num_computed = min(self.num_computed, self.num_tokens - 1)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}[{self.index}], computed {self.num_computed} of {self.num_tokens},"
            f" {len(self.page_ids)} pages, {self.finish_reason or 'live'})"
        )


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """What one engine step added to one sample of a request; what the server streams."""

    request_id: str
    index: int
    text: str
    """New text. May be empty: half a UTF-8 character, or text held back as a possible stop string."""
    token_ids: tuple[int, ...]
    """New token ids (the stop token included)."""
    logprobs: tuple[TokenLogprob, ...]
    """One per new token when SamplingParams.logprobs is set, else empty."""
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    """Tokens sampled so far in this sample."""
    error: MoEServeError | None = None
    """Set with FinishReason.ERROR: what the client is told."""
    stats: FinishedStats | None = None
    """With the last output: the sample's times."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With sample 0's first output when SamplingParams.prompt_logprobs is set: of the prompt but its first token."""
    text_starts: tuple[int, ...] = ()
    """One per new token, aligned with `logprobs`: where its text begins in the sample's text, in characters."""
    num_disk_tokens: int = 0
    """Of the cached tokens, those that came from disk."""


@dataclass(slots=True)
class Completion:
    """One sample put together from its outputs: what a caller who does not stream gets."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_starts: list[int] = field(default_factory=list)
    """Aligned with `logprobs`; see SampleOutput."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, output: SampleOutput) -> None:
        """Append what one step added."""
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.text_starts += output.text_starts
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
