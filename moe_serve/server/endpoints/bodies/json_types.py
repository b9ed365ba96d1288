"""JSON's numbers and truth values, each taken for nothing else: pydantic alone reads 0.0 as false and true as 1."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def _no_bool(value: Any) -> Any:
    """JSON true is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool), Field(strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
