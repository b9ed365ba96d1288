"""JSON's numbers and truth values, each taken for nothing else: pydantic alone reads 0.0 as false and true as 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

T = TypeVar("T")


def _no_bool(value: Any) -> Any:
    """JSON true is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool), Field(strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
JsonList = Annotated[list[T], Field(fail_fast=True)]
"""Only its first wrong element is looked at: collecting the errors of a million would take seconds."""


def at_most(size: int) -> BeforeValidator:
    """A list or object of more than `size` elements is refused before they are looked at."""
    return BeforeValidator(_check_size(size))


def _check_size(size: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > size:
            raise ValueError(f"must have at most {size} elements, has {len(value)}")
        return value

    return check
