"""Launching with the next smaller configuration where a GPU refuses one.

Configurations are chosen by what a GPU is known to have. A driver that reserves shared memory, a compiler that needs
more of it, or a GPU that came later would otherwise end the server with a launch error.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from triton.runtime.errors import OutOfResources

log = logging.getLogger(__name__)
Choice = TypeVar("Choice")
Result = TypeVar("Result")


def run_first_that_fits(choices: Sequence[Choice], run: Callable[[Choice], Result]) -> Result:
    """`run` with the first of `choices` that the GPU takes; what a refused attempt wrote is written again.

    Choices are hashable. OutOfResources: the GPU refused all of them.
    """
    for choice in choices[:-1]:
        try:
            return run(choice)
        except OutOfResources as error:
            _warn(choice, str(error))
    return run(choices[-1])


@functools.cache
def _warn(choice: object, reason: str) -> None:
    """One line for each configuration."""
    log.warning("%s does not fit this GPU (%s); a smaller one is used", choice, reason)
