"""The OpenAI-compatible request bodies, and how each becomes SamplingParams.

A field is supported, or refused by name: unknown fields and fields we do not implement are errors,
never ignored. Knows pydantic and SamplingParams; knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.server.endpoints.bodies import unsupported_fields
from moe_serve.server.endpoints.bodies.chat_messages import Message
from moe_serve.server.endpoints.bodies.json_types import Flag, Int, Number
from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.structured import StructuredFields
from moe_serve.server.endpoints.bodies.tools import Tool, ToolChoice
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal

DIRECT_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)
"""Body fields that are SamplingParams fields of the same name; null means the default."""


def _range(low: float | None = None, high: float | None = None) -> Any:
    """A field whose range SamplingParams checks; the OpenAPI document only shows it."""
    limits = {"minimum": low, "maximum": high}
    return Field(default=None, json_schema_extra={k: v for k, v in limits.items() if v is not None})


class StreamOptions(BaseModel):
    """`stream_options` of a streamed request."""

    model_config = ConfigDict(extra="forbid")

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Literal[False] | None = None
    """Padding against guessing tokens from packet sizes: only `false`."""


class SamplingBody(Body, StructuredFields):
    """What chat and text completions have in common."""

    model: str | None = None
    """The served model's name or path; may be left out."""
    n: Int | None = _range(1, 128)
    """Number of answers, 1 to 128."""
    temperature: Number | None = _range(0)
    """0 is greedy. Default: the checkpoint's, else 1."""
    top_p: Number | None = _range(0, 1)
    """Above 0, at most 1."""
    top_k: Int | None = _range(-1)
    """0 or -1: off."""
    min_p: Number | None = _range(0, 1)
    """0 to 1, as a fraction of the likeliest token's probability."""
    presence_penalty: Number | None = _range(-2, 2)
    """-2 to 2."""
    frequency_penalty: Number | None = _range(-2, 2)
    """-2 to 2."""
    repetition_penalty: Number | None = _range(0)
    """Above 0; counts the prompt too."""
    seed: Int | None = _range(-(2**63), 2**63 - 1)
    """Same seed, same request: same tokens, whatever else runs."""
    stop: str | list[str] | None = None
    """Up to 16 strings."""
    stop_token_ids: list[Int] | None = None
    """Tokens that end the answer."""
    min_tokens: Int | None = _range(0)
    """No end before so many tokens; a complete grammar ends all the same."""
    include_stop_str_in_output: Flag | None = None
    """Keep the stop string in the text."""
    ignore_eos: Flag | None = None
    """Go on after the end token; not with a grammar."""
    skip_special_tokens: Flag | None = None
    """Leave special tokens out of the text; true by default."""
    logit_bias: dict[str, Number] | None = None
    """Token id to -100 .. 100."""
    allowed_token_ids: Annotated[list[Int], Field(min_length=1)] | None = None
    """Nothing else is sampled."""
    bad_words: Annotated[list[str], Field(max_length=1000)] | None = None
    """Words that are not said."""
    prompt_logprobs: Int | None = _range(0, 20)
    """Log-probability of each prompt token and 0 to 20 alternatives; not with stream. Cached prefixes are not used."""
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None
    """Keep the last so many tokens of the prompt; -1: as many as fit."""
    priority: Annotated[Int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower goes first among waiting requests; 0 by default."""
    cache_salt: str | None = Field(default=None, min_length=1, max_length=200)
    """Share cached prefixes only with requests of the same salt."""
    stream: Flag | None = None
    """Server-sent events, ended by [DONE]."""
    stream_options: StreamOptions | None = None
    """include_usage, continuous_usage_stats."""
    return_token_ids: Flag | None = None
    """Adds token_ids to choices, and prompt_token_ids."""
    return_tokens_as_token_ids: Flag | None = None
    """In logprobs, write each token as token_id:ID, because texts of tokens may be equal."""
    request_id: str | None = Field(default=None, max_length=200, pattern=r"^[!-~]+$")
    """Printable ASCII, because it comes back in a header. The header X-Request-Id does the same."""
    user: str | None = None
    """Accepted and unused, as OpenAI documents it: an end-user tag for abuse monitoring."""
    safety_identifier: str | None = None
    """Accepted and unused, as user."""
    prompt_cache_key: str | None = None
    """Accepted and unused: every equal prefix is shared."""
    metadata: dict[str, str] | None = None
    """Accepted and unused: tags for stored answers, and none are stored."""

    def check_stream(self) -> None:
        """Refuse what does not go with, or without, a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "stream_options needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs", "prompt_logprobs cannot be streamed")

    def sampling_params(
        self,
        defaults: Mapping[str, Any],
        max_tokens: int | None,
        logprobs: int | None,
        **more: Any,
    ) -> SamplingParams:
        """SamplingParams from the body, the checkpoint's defaults, and ours, in this order; `more` goes first."""
        values = dict(defaults)
        values |= {name: value for name in DIRECT_FIELDS if (value := getattr(self, name)) is not None}
        if max_tokens is not None:
            values["max_tokens"] = max_tokens
        values |= {
            "logprobs": logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "allowed_token_ids": tuple(self.allowed_token_ids or ()),
            "logit_bias": _logit_bias(self.logit_bias or {}),
        }
        return SamplingParams(**values | more)


def _logit_bias(values: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(key): float(value) for key, value in values.items()}
    except ValueError:
        raise InvalidRequestError("logit_bias", "logit_bias maps token ids (as strings) to numbers") from None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Int] | list[list[Int]]
    """Text, token ids, or up to 128 of either."""
    max_tokens: Int | None = 16
    """16, as in the OpenAI API; null: to the end of the context; 0: only the prompt is computed."""
    logprobs: Int | None = _range(0, 20)
    """0 to 20 alternatives for each token."""
    echo: Flag | None = None
    """Repeat the prompt's text; with logprobs, also say how likely each of its tokens was."""
    add_special_tokens: Flag = True
    """Let the tokenizer add its start token."""

    unsupported: ClassVar[Mapping[str, Refusal]] = unsupported_fields.COMPLETION


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    """Text content only, as a string or text parts; tool calls and their results where the template has them."""
    tools: list[Tool] | None = None
    """Functions; the chat template must show them."""
    tool_choice: ToolChoice | None = None
    """none, auto (needs a response template), required, or a function by name."""
    parallel_tool_calls: Flag | None = None
    """false: at most one call."""
    max_tokens: Int | None = _range(1)
    """At least 1. Default: to the end of the context."""
    max_completion_tokens: Int | None = _range(1)
    """The newer name of max_tokens, and goes before it."""
    logprobs: Flag | None = None
    """Log-probability of each sampled token."""
    top_logprobs: Int | None = _range(0, 20)
    """0 to 20 alternatives; needs logprobs."""
    reasoning_effort: str | None = None
    """Given to the chat template, which must use it."""
    include_reasoning: Flag | None = None
    """false: leave reasoning_content out."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    add_generation_prompt: Flag = True
    """Open the assistant's turn."""
    continue_final_message: Flag = False
    """Go on with the last message instead of answering it."""

    unsupported: ClassVar[Mapping[str, Refusal]] = unsupported_fields.CHAT

    def completion_limit(self) -> int | None:
        """max_completion_tokens, or the older max_tokens."""
        for name in ("max_completion_tokens", "max_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise InvalidRequestError(name, f"{name} must be at least 1, got {limit}")
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def num_logprobs(self) -> int | None:
        """SamplingParams.logprobs for `logprobs` and `top_logprobs`."""
        if not self.logprobs:
            if self.top_logprobs:
                raise InvalidRequestError("top_logprobs", "top_logprobs needs logprobs: true")
            return None
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise InvalidRequestError("top_logprobs", f"top_logprobs must be between 0 and 20, got {self.top_logprobs}")
        return self.top_logprobs or 0


class TokenizeBody(Body):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    """The served model's name or path; may be left out."""
    prompt: str | None = None
    """Text."""
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    """A conversation, instead of prompt."""
    tools: list[Tool] | None = None
    """As in a chat completion."""
    add_special_tokens: Flag | None = None
    """For a prompt; true by default."""
    add_generation_prompt: Flag = True
    """For messages, as in a chat completion."""
    continue_final_message: Flag = False
    """For messages, as in a chat completion."""
    chat_template_kwargs: dict[str, Any] | None = None
    """For messages, as in a chat completion."""
    return_token_strs: Flag | None = None
    """Adds each token's text."""


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    """The served model's name or path; may be left out."""
    tokens: list[Annotated[Int, Field(ge=0)]]
    """Token ids."""


class ExpertCacheBody(Body):
    """POST /moe_cache."""

    mib: Annotated[Int, Field(ge=1)]
    """Memory for experts, as --moe-cache-mib."""
