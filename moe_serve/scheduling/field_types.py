"""Types of request fields: callers from Python have no schema that checks them first, as HTTP clients have.

Functions return a value in the form that is kept, or raise InvalidRequestError naming the field.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

from moe_serve.errors import InvalidRequestError

INTEGERS = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
MAY_BE_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
REALS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def kept_values(params: Any) -> Iterator[tuple[str, Any]]:
    """The fields of SamplingParams that are kept in another form than they may be given in; numbers are checked."""
    _check_numbers(params)
    yield "stop", strings("stop", params.stop)
    yield "bad_words", token_words("bad_words", params.bad_words)
    for name in ("stop_token_ids", "allowed_token_ids"):
        yield name, token_ids(name, getattr(params, name))


def strings(param: str, value: Any) -> tuple[str, ...]:
    """One string, or several; None is none."""
    if value is None:
        return ()
    found = (value,) if isinstance(value, str) else _items(param, value, "a string or a list of strings")
    if not all(isinstance(item, str) for item in found):
        raise InvalidRequestError(param, f"{param} takes a string or a list of strings, got {value!r}")
    return found


def token_ids(param: str, value: Any) -> tuple[int, ...]:
    """Token ids; None is none."""
    found = () if value is None else _items(param, value, "a list of token ids")
    if not all(_is_int(item) for item in found):
        raise InvalidRequestError(param, f"{param} takes a list of token ids, got {_shown(value)}")
    return found


def token_words(param: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """Words as token ids; None is none."""
    found = () if value is None else _items(param, value, "lists of token ids")
    return tuple(token_ids(param, item) for item in found)


def _check_numbers(values: object) -> None:
    """InvalidRequestError for an attribute that is no such number."""
    for names, is_right, wanted in ((INTEGERS, _is_int, "an integer"), (REALS, _is_real, "a number")):
        for name in names:
            value = getattr(values, name)
            if not is_right(value) and not (value is None and name in MAY_BE_NONE):
                raise InvalidRequestError(name, f"{name} takes {wanted}, got {_shown(value)}")


def _items(param: str, value: Any, wanted: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        raise InvalidRequestError(param, f"{param} takes {wanted}, got {_shown(value)}")
    return tuple(value)


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
