"""From a body's prompt or messages to token ids, and from its words to token ids.

Between the bodies and the tokenizer; knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_serve.errors import InvalidRequestError
from moe_serve.server.endpoints.bodies.chat_messages import ROLES, Message
from moe_serve.server.endpoints.bodies.common_fields import TemplateFields
from moe_serve.server.endpoints.bodies.sampling_body import SamplingBody
from moe_serve.text.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]
TRUNCATED_CONTEXTS = 8
"""A prompt that is cut to its end may be at most this many times as long as the context."""
MAX_WORD_CHARS = 1000


def render(
    body: TemplateFields,
    messages: Sequence[Message],
    tools: Tools,
    tokenizer: Tokenizer,
    effort: str | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """Token ids of a conversation; refuses what the chat template would silently leave out.

    `effort`: the field reasoning_effort. A text that cannot be as few as `max_tokens` is refused by its length.
    """
    kwargs = dict(body.chat_template_kwargs or {})
    more = {} if effort is None else {"reasoning_effort": effort}
    ids = _render(body, messages, tools, tokenizer, {**kwargs, **more}, max_tokens)
    if effort is not None and ids == _render(body, messages, tools, tokenizer, kwargs, max_tokens):
        raise InvalidRequestError("reasoning_effort", "this model's chat template does not use reasoning_effort")
    if tools and ids == render(body, messages, (), tokenizer, effort, max_tokens):
        raise InvalidRequestError("tools", "this model's chat template does not show tools to the model")
    return ids


def _render(
    body: TemplateFields,
    messages: Sequence[Message],
    tools: Tools,
    tokenizer: Tokenizer,
    kwargs: dict[str, Any],
    max_tokens: int | None,
) -> list[int]:
    _check_roles(messages, tokenizer)
    return tokenizer.render_chat(
        [m.as_template_input(i) for i, m in enumerate(messages)],
        tools=tools,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=kwargs,
        max_tokens=max_tokens,
    )


def _check_roles(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """A role that nothing treats in its own way would come out as a word of the prompt."""
    template = str(tokenizer.hf.chat_template)
    for index, message in enumerate(messages):
        role = message.role
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            known = ", ".join(ROLES)
            raise InvalidRequestError("messages", f"messages[{index}].role: {role[:100]!r} is none of {known}")


def most_tokens(body: SamplingBody, max_model_len: int) -> int:
    """Tokens that a prompt's text may come to before it is tokenised: more where only its end is kept."""
    return max_model_len if body.truncate_prompt_tokens is None else TRUNCATED_CONTEXTS * max_model_len


def truncated(prompt: Sequence[int], body: SamplingBody, max_tokens: int | None, max_model_len: int) -> tuple[int, ...]:
    """The last `truncate_prompt_tokens` tokens of a prompt; -1 means as many as leave room for max_tokens."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return tuple(prompt)
    if keep == 0:
        raise InvalidRequestError("truncate_prompt_tokens", "truncate_prompt_tokens must be -1 or at least 1")
    if keep < 0:
        keep = max(1, max_model_len - (max_tokens or 1))
    return tuple(prompt[-keep:])


def bad_words(words: Sequence[str] | None, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as token sequences: at the start of a text, and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words or ():
        if not word.strip():
            raise InvalidRequestError("bad_words", "bad_words must not contain an empty word")
        if len(word) > MAX_WORD_CHARS:
            raise InvalidRequestError("bad_words", f"a word of bad_words has at most {MAX_WORD_CHARS} characters")
        for text in (word, " " + word.lstrip()):
            found[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return tuple(found)
