"""POST /tokenize and /detokenize: text or a conversation to token ids, and back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import Field

from moe_serve.errors import InvalidRequestError
from moe_serve.server.endpoints.bodies import prompts
from moe_serve.server.endpoints.bodies.chat_messages import Message
from moe_serve.server.endpoints.bodies.common_fields import TemplateFields
from moe_serve.server.endpoints.bodies.given import TheService, parsed, prepared
from moe_serve.server.endpoints.bodies.json_types import Flag, Int, JsonList
from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.tools import Tool
from moe_serve.text.tokenizer import Tokenizer

router = APIRouter()


class TokenizeBody(Body, TemplateFields):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    """The served model's name or path; may be left out."""
    prompt: str | None = None
    """Text."""
    messages: Annotated[JsonList[Message], Field(min_length=1)] | None = None
    """A conversation, instead of prompt."""
    tools: JsonList[Tool] | None = None
    """As in a chat completion."""
    add_special_tokens: Flag | None = None
    """For a prompt; true by default."""
    return_token_strs: Flag | None = None
    """Adds each token's text."""


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    """The served model's name or path; may be left out."""
    tokens: JsonList[Annotated[Int, Field(ge=0)]]
    """Token ids."""


@router.post("/tokenize")
async def tokenize(
    body: Annotated[TokenizeBody, Depends(parsed(TokenizeBody))], service: TheService, http: HttpRequest
) -> dict[str, Any]:
    """Token ids of a prompt or a conversation."""
    service.check_model(body.model)
    return await prepared(http, lambda: _tokenized(body, service))


def _tokenized(body: TokenizeBody, service: TheService) -> dict[str, Any]:
    ids = _token_ids(body, service.tokenizer, service.max_model_len)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_text(i) for i in ids]
    return answer


def _token_ids(body: TokenizeBody, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", "give exactly one of prompt and messages")
    if body.messages is not None:
        shown = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        return prompts.render(body, body.messages, shown, tokenizer, max_tokens=max_tokens)
    return tokenizer.encode(body.prompt or "", body.add_special_tokens is not False, max_tokens)


@router.post("/detokenize")
async def detokenize(
    body: Annotated[DetokenizeBody, Depends(parsed(DetokenizeBody))], service: TheService, http: HttpRequest
) -> dict[str, str]:
    """The text of token ids."""
    service.check_model(body.model)
    return {"prompt": await prepared(http, lambda: _text(body.tokens, service.tokenizer))}


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    bad = next((t for t in ids if t >= tokenizer.vocab_size), None)
    if bad is not None:
        raise InvalidRequestError("tokens", f"token id {bad} is outside the vocabulary")
    return tokenizer.decode(ids, skip_special_tokens=False)
