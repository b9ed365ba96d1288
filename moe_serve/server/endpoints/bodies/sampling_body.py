"""What the bodies of text and chat completions have in common, and how it becomes SamplingParams.

A field is supported, or refused by name: unknown fields and fields we do not implement are errors,
never ignored. Knows pydantic and SamplingParams; knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.server.endpoints.bodies.common_fields import CommonFields, in_range
from moe_serve.server.endpoints.bodies.json_types import Flag, Int, JsonList, Number, at_most
from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.structured import StructuredFields

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
MAX_BIASES = 10_000
MAX_TAGS = 1000


class StreamOptions(BaseModel):
    """`stream_options` of a streamed request."""

    model_config = ConfigDict(extra="forbid")

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Literal[False] | None = None
    """Padding against guessing tokens from packet sizes: only `false`."""


class SamplingBody(Body, StructuredFields, CommonFields):
    """What chat and text completions have in common."""

    n: Int | None = in_range(1, 128)
    """Number of answers, 1 to 128."""
    stop_token_ids: JsonList[Int] | None = None
    """Tokens that end the answer."""
    min_tokens: Int | None = in_range(0)
    """The answer does not end before it has this many tokens; a complete grammar ends it earlier."""
    include_stop_str_in_output: Flag | None = None
    """Keep the stop string in the text."""
    ignore_eos: Flag | None = None
    """Go on after the end token; not with a grammar."""
    skip_special_tokens: Flag | None = None
    """Leave special tokens out of the text; true by default."""
    logit_bias: Annotated[dict[str, Number], at_most(MAX_BIASES)] | None = None
    """Token id to -100 .. 100."""
    allowed_token_ids: Annotated[JsonList[Int], Field(min_length=1)] | None = None
    """Nothing else is sampled."""
    bad_words: Annotated[JsonList[str], Field(max_length=1000)] | None = None
    """Words that are not said."""
    prompt_logprobs: Int | None = in_range(0, 20)
    """Log-probability of each prompt token and 0 to 20 alternatives; not with stream. Cached prefixes are not used."""
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None
    """Keep the last N tokens of the prompt; -1: as many as fit."""
    stream_options: StreamOptions | None = None
    """include_usage, continuous_usage_stats."""
    return_token_ids: Flag | None = None
    """Adds token_ids to choices, and prompt_token_ids."""
    return_tokens_as_token_ids: Flag | None = None
    """In logprobs, write each token as token_id:ID, because texts of tokens may be equal."""
    metadata: Annotated[dict[str, str], at_most(MAX_TAGS)] | None = None
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
