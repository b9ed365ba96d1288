"""Numbered laws of a base file, as test failures name them.

A test of law 3 is decorated with `law(3)`, made by `laws_of(module)`. When it fails, the law's text comes first.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])
NUMBERED = re.compile(r"^(\d+)\. (.*(?:\n   .*)*)", flags=re.MULTILINE)


def laws_in(module: ModuleType) -> dict[int, str]:
    """The numbered list in the module's docstring."""
    return {int(number): " ".join(text.split()) for number, text in NUMBERED.findall(module.__doc__ or "")}


def laws_of(module: ModuleType) -> Callable[[int], Callable[[Test], Test]]:
    """A decorator for the tests of each law. KeyError where the docstring has no such law."""
    laws = laws_in(module)

    def law(number: int) -> Callable[[Test], Test]:
        text = f"{module.__name__}, law {number}: {laws[number]}"
        return lambda test: _naming(test, text)

    return law


def _naming(test: Test, text: str) -> Test:
    @functools.wraps(test)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return test(*args, **kwargs)
        except AssertionError as error:
            raise AssertionError(f"{text}\n{error}") from error

    return checked  # type: ignore[return-value]
