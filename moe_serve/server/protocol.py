"""The OpenAI-compatible request bodies, and how each becomes SamplingParams.

A field is supported, or refused by name: unknown fields and fields we do not implement are errors,
never ignored. Knows pydantic and SamplingParams; knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moe_serve.errors import InvalidRequestError, UnsupportedFieldError
from moe_serve.sequence import SamplingParams
from moe_serve.server.parsing import Body

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


def _no_bool(value: Any) -> Any:
    """JSON true is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool), Field(strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class StreamOptions(BaseModel):
    """`stream_options` of a streamed request."""

    model_config = ConfigDict(extra="forbid")

    include_usage: Flag = False
    continuous_usage_stats: Flag = False


class SamplingBody(Body):
    """What chat and text completions have in common."""

    model: str | None = None
    n: Int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Int | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    min_tokens: Int | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    logit_bias: dict[str, Number] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: Flag | None = None
    request_id: str | None = Field(default=None, max_length=200, pattern=r"^[!-~]+$")
    """Printable ASCII, because it comes back in a header."""
    user: str | None = None
    """Accepted and unused, as OpenAI documents it: an end-user tag for abuse monitoring."""

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "stream_options needs stream: true")

    def sampling_params(
        self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """SamplingParams from the body, the checkpoint's defaults, and ours, in this order."""
        values = dict(defaults)
        values |= {name: value for name in DIRECT_FIELDS if (value := getattr(self, name)) is not None}
        if max_tokens is not None:
            values["max_tokens"] = max_tokens
        return SamplingParams(
            **values,
            logprobs=logprobs,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_logit_bias(self.logit_bias or {}),
        )


def _logit_bias(values: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(key): float(value) for key, value in values.items()}
    except ValueError:
        raise InvalidRequestError("logit_bias", "logit_bias maps token ids (as strings) to numbers") from None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Int] | list[list[Int]]
    max_tokens: Int | None = 16
    """16, as in the OpenAI API."""
    logprobs: Int | None = None
    echo: Flag | None = None
    add_special_tokens: Flag = True

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (None, 1),
        "suffix": (None, ""),
        "prompt_logprobs": (None,),
        "response_format": (None, {"type": "text"}),
        "guided_json": (None,),
        "guided_regex": (None,),
        "guided_choice": (None,),
        "guided_grammar": (None,),
        "structured_outputs": (None,),
        "use_beam_search": (None, False),
        "length_penalty": (None, 1, 1.0),
        "priority": (None, 0),
        "lora_request": (None,),
        "truncate_prompt_tokens": (None,),
    }


class ContentPart(BaseModel):
    """One part of a message's content; only text is supported."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn. Further keys are passed to the chat template, which may use them."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[ContentPart] | None = None

    def as_template_input(self, index: int) -> dict[str, Any]:
        """The message as chat templates expect it: content as one string."""
        message = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            other = next((p.type for p in self.content if p.type != "text" or p.text is None), None)
            if other is not None:
                raise UnsupportedFieldError("messages", f"messages[{index}].content: {other!r} parts are not supported")
            message["content"] = "".join(p.text or "" for p in self.content)
        return message


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    logprobs: Flag | None = None
    top_logprobs: Int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "audio": (None,),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "metadata": (None, {}),
        "web_search_options": (None,),
        "verbosity": (None,),
        "prompt_logprobs": (None,),
        "guided_json": (None,),
        "guided_regex": (None,),
        "guided_choice": (None,),
        "guided_grammar": (None,),
        "structured_outputs": (None,),
        "best_of": (None, 1),
        "use_beam_search": (None, False),
        "length_penalty": (None, 1, 1.0),
        "echo": (None, False),
        "priority": (None, 0),
        "chat_template": (None,),
        "documents": (None, []),
        "mm_processor_kwargs": (None,),
        "truncate_prompt_tokens": (None,),
    }

    def completion_limit(self) -> int | None:
        """max_completion_tokens, or the older max_tokens."""
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise InvalidRequestError("max_completion_tokens", "max_completion_tokens must be at least 1")
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
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: Literal[True, False, None] = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[Int, Field(ge=0)]]


class ExpertCacheBody(Body):
    """POST /moe_cache."""

    mib: Annotated[Int, Field(ge=1)]
    """Memory for experts, as --moe-cache-mib."""
