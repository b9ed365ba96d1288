"""Request bytes -> a checked body, or an InvalidRequestError that names the field. Knows no engine."""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_serve.errors import InvalidRequestError, MediaTypeError, UnsupportedFieldError
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal

MAX_ELEMENTS = 500_000
"""Reading these holds the interpreter, and so every stream, for less than a tenth of a second."""
MAX_FIELDS = 300
JSON_TYPE = "application/json"
MAX_PROBLEMS = 20
"""Of one field that are looked at."""
KIND = re.compile(r"(str|int|float|bool|[A-Z]\w*)$|(literal|list|dict|constrained|function)[\[-]")
"""What pydantic puts into a place to name one of the kinds that a field takes."""
OBJECT = re.compile(r"a valid dictionary or instance of \w+")
MAX_SHOWN = 100
"""Characters of a client's own name in an error."""


class Body(BaseModel):
    """A request body: unknown fields are errors, and so are the known ones in `unsupported`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    unsupported: ClassVar[Mapping[str, Refusal]] = {}
    """Fields of the OpenAI or vLLM API we do not implement."""
    error_schema: ClassVar[str] = "Error"
    """The shape of this endpoint's errors, in the OpenAPI document."""
    may_be_absent: ClassVar[bool] = False
    """A request without a body means one without fields."""


BodyT = TypeVar("BodyT", bound=Body)


def check_media_type(headers: Mapping[str, str]) -> None:
    """MediaTypeError unless the headers, where they say anything, say JSON in UTF-8 as it is."""
    kind, *parameters = (part.strip().lower() for part in headers.get("content-type", JSON_TYPE).split(";"))
    if kind != JSON_TYPE:
        raise MediaTypeError(f"the body must be JSON: send `Content-Type: {JSON_TYPE}`, not {kind[:MAX_SHOWN]!r}")
    charsets = [value for value in parameters if value.startswith("charset=")]
    if any(value.removeprefix("charset=").strip('"') not in ("utf-8", "utf8", "us-ascii") for value in charsets):
        raise MediaTypeError("the body must be JSON in UTF-8")
    if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise MediaTypeError("the body must come as it is, without a Content-Encoding")


def parse(raw: bytes, body_class: type[BodyT], max_elements: int = MAX_ELEMENTS) -> BodyT:
    """Read and validate a JSON body. Its size in Python is bounded first, since reading it holds the interpreter."""
    fields = {} if body_class.may_be_absent and not raw else _load(raw, max_elements)
    for name, refusal in body_class.unsupported.items():
        if name in fields and fields.pop(name) not in refusal.harmless:
            raise UnsupportedFieldError(name, f"{name} is not supported by this server ({refusal.why}); remove it")
    try:
        return body_class.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid_request(error, body_class) from None


def _load(raw: bytes, max_elements: int) -> dict[str, Any]:
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if sum(raw.count(sign) for sign in (b",", b"[", b"{", b"\\")) > max_elements:
        message = f"the request body has more than {max_elements} commas, brackets and escaped characters together"
        raise InvalidRequestError("body", f"{message}; send less at a time")
    try:
        fields = json.loads(raw.decode())
        if b"\\ud" in raw or b"\\uD" in raw:  # maybe half of a surrogate pair, which no later step could encode
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("body", f"the request body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("body", "the request body must be a JSON object")
    if len(fields) > MAX_FIELDS:
        raise InvalidRequestError("body", f"the request body has {len(fields)} fields, more than there are")
    return fields


def _as_invalid_request(error: ValidationError, body_class: type[BaseModel]) -> InvalidRequestError:
    """The first field that pydantic found fault with, in a sentence that names it."""
    first, *others = error.errors(include_url=False, include_context=False)
    field = str(first["loc"][0])[:MAX_SHOWN] if first["loc"] else "body"
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return InvalidRequestError(field, f"unknown field {field!r}{_near(field, body_class)}")
    same = [e for e in others[:MAX_PROBLEMS] if e["loc"] and e["loc"][:1] == first["loc"][:1]]
    return InvalidRequestError(field, wrong_value([first, *same]))


def wrong_value(problems: Sequence[Mapping[str, Any]]) -> str:
    """What pydantic says of one field, in a sentence that names the place.

    Where a field takes one of several kinds, there is a problem for each. The one that got furthest into the value says
    what is wrong with it; where none got in, all together say what the field takes.
    """
    depth = max(len(p["loc"]) for p in problems)
    deepest = [p for p in problems if len(p["loc"]) == depth]
    furthest = max(deepest, key=lambda p: p["loc"][-1] if p["loc"] and isinstance(p["loc"][-1], int) else -1)
    is_inside = bool(furthest["loc"]) and isinstance(furthest["loc"][-1], int)
    told = [furthest] if is_inside or depth < 2 else deepest
    path = ".".join(str(part)[:MAX_SHOWN] for part in furthest["loc"] if not KIND.match(str(part))) or "body"
    first, *more = dict.fromkeys(OBJECT.sub("an object", p["msg"]).removeprefix("Value error, ") for p in told)
    return " or ".join([f"{path}: {first}", *(text.removeprefix("Input should be ") for text in more)])


def _near(field: str, body_class: type[BaseModel]) -> str:
    close = difflib.get_close_matches(field, body_class.model_fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
