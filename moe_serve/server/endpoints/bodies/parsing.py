"""Request bytes -> a checked body, or an InvalidRequestError that names the field. Knows no engine."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_serve.errors import InvalidRequestError, UnsupportedFieldError
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal


class Body(BaseModel):
    """A request body: unknown fields are errors, and so are the known ones in `unsupported`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    unsupported: ClassVar[Mapping[str, Refusal]] = {}
    """Fields of the OpenAI or vLLM API we do not implement."""
    may_be_absent: ClassVar[bool] = False
    """A request without a body means one without fields."""


BodyT = TypeVar("BodyT", bound=Body)


async def parse(request: HttpRequest, body_class: type[BodyT]) -> BodyT:
    """Read and validate a JSON body."""
    raw = await request.body()
    fields = {} if body_class.may_be_absent and not raw else _load(raw)
    for name, refusal in body_class.unsupported.items():
        if name in fields and fields.pop(name) not in refusal.harmless:
            raise UnsupportedFieldError(name, f"{name} is not supported by this server ({refusal.why}); remove it")
    try:
        return body_class.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid_request(error, body_class) from None


def _load(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode()
        fields = json.loads(text)
        if "\\ud" in text.lower():  # maybe half of a surrogate pair, which no later step could encode
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("body", f"the request body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("body", "the request body must be a JSON object")
    return fields


def _as_invalid_request(error: ValidationError, body_class: type[BaseModel]) -> InvalidRequestError:
    """The first problem pydantic found, in a sentence that names the field."""
    problem = error.errors(include_url=False, include_context=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else "body"
    path = ".".join(str(part) for part in problem["loc"]) or "body"
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        return InvalidRequestError(field, f"unknown field {field!r}{_near(field, body_class)}")
    return InvalidRequestError(field, f"{path}: {problem['msg']}")


def _near(field: str, body_class: type[BaseModel]) -> str:
    close = difflib.get_close_matches(field, body_class.model_fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
