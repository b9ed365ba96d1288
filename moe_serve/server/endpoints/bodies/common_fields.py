"""Fields that all bodies which ask for text have under one name and with one meaning. Knows pydantic only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from moe_serve.server.endpoints.bodies.json_types import Flag, Int, JsonList, Number


def in_range(low: float | None = None, high: float | None = None) -> Any:
    """A field whose range SamplingParams checks; the OpenAPI document only shows it."""
    limits = {"minimum": low, "maximum": high}
    return Field(default=None, json_schema_extra={k: v for k, v in limits.items() if v is not None})


class CommonFields(BaseModel):
    """How to sample, and what a request says about itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str | None = None
    """The served model's name or path; may be left out."""
    temperature: Number | None = in_range(0, 10_000)
    """0 to 10,000 (OpenAI: 2; vLLM: any); 0 is greedy. Default: the checkpoint's, else 1."""
    top_p: Number | None = in_range(0, 1)
    """Above 0, at most 1."""
    top_k: Int | None = in_range(-1)
    """0 or -1: off."""
    min_p: Number | None = in_range(0, 1)
    """0 to 1, as a fraction of the likeliest token's probability."""
    presence_penalty: Number | None = in_range(-2, 2)
    """-2 to 2."""
    frequency_penalty: Number | None = in_range(-2, 2)
    """-2 to 2."""
    repetition_penalty: Number | None = in_range(0)
    """Above 0; counts the prompt too."""
    seed: Int | None = in_range(-(2**63), 2**63 - 1)
    """Same seed, same request: same tokens, whatever else runs."""
    stop: str | JsonList[str] | None = None
    """Up to 16 strings."""
    priority: Annotated[Int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower goes first among waiting requests; 0 by default."""
    cache_salt: str | None = Field(default=None, min_length=1, max_length=200)
    """Share cached prefixes only with requests of the same salt."""
    stream: Flag | None = None
    """Server-sent events, ended by [DONE]; those of a response have names and end with its last state."""
    request_id: str | None = Field(default=None, max_length=200, pattern=r"^[!-~]+$")
    """Printable ASCII, because it comes back in a header. The header X-Request-Id does the same."""
    user: str | None = None
    """Accepted and unused, as OpenAI documents it: an end-user tag for abuse monitoring."""
    safety_identifier: str | None = None
    """Accepted and unused, as user."""
    prompt_cache_key: str | None = None
    """Accepted and unused: every equal prefix is shared."""
    prompt_cache_retention: Any = None
    """Accepted and unused: prefixes are kept as long as there is room."""
    prompt_cache_options: Any = None
    """Accepted and unused, as prompt_cache_retention."""


class TemplateFields(BaseModel):
    """Fields of a conversation that its chat template sees."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    add_generation_prompt: Flag = True
    """Open the assistant's turn."""
    continue_final_message: Flag = False
    """Go on with the last message instead of answering it."""
