"""Errors about a chat body, made from another body, under the names that the other body's fields have.

Knows pydantic; knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pydantic import ValidationError

from moe_serve.errors import InvalidRequestError


@contextmanager
def errors_under(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors name the field that the client sent. `names`: chat body's field -> the client's."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = names.get(str(problem["loc"][0]), str(problem["loc"][0]))
        raise InvalidRequestError(field, f"{field}: {problem['msg']}") from None
    except InvalidRequestError as error:
        error.param = names.get(error.param, error.param)
        raise
