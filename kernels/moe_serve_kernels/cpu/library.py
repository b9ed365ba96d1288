"""Finding and loading the compiled kernels, once per process.

Knows file names only. A missing library is normal (no compiler at install time): callers ask
`load()` and take their torch path when it returns None.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_serve_kernels.cpu.layout import LayoutError, filled, parse

log = logging.getLogger(__name__)


class Native:
    """The compiled library: functions as attributes, structs and values by their names in C++."""

    def __init__(self, path: Path) -> None:
        """OSError: `path` is no library. LayoutError: it is one of other sources than this Python code's."""
        library = ctypes.CDLL(str(path))
        try:
            tell = library.moe_serve_layout
        except AttributeError as error:
            rebuild = "python setup.py build_ext --inplace"
            raise LayoutError(f"{path} was built from other sources; build it again: {rebuild}") from error
        tell.restype = ctypes.c_char_p
        self._layout = parse(tell().decode())
        for name, signature in self._layout.functions.items():
            function = library[name]
            function.argtypes, function.restype = signature.arguments, signature.result
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise LayoutError(f"the C++ library has no function {name}")

    @property
    def isa(self) -> str:
        """The instruction set that the kernels use here: amx (AVX-512 with bf16 tiles), avx512, avx2 or generic."""
        return self._layout.isa

    def new(self, struct: str, **fields: Any) -> Any:
        """A struct, all fields given by name; None is a null pointer. LayoutError names a field that is not right."""
        return filled(self._layout.structs[struct], fields)

    def array(self, struct: str, members: list[Any]) -> Any:
        """`members`, made by `new`, side by side."""
        return (self._layout.structs[struct] * len(members))(*members)

    def value(self, name: str) -> int:
        """Of a constant or, as Enum.NAME in any case, of an enum."""
        enum, dot, member = name.partition(".")
        known = enum + dot + member.upper()
        if known not in self._layout.values:
            raise LayoutError(f"the C++ library has no value {known}")
        return self._layout.values[known]


@functools.cache
def load() -> Native | None:
    """The compiled library, or None with a log line that says what that costs. LayoutError: it is out of date."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    for path in found:
        try:
            return Native(path)
        except OSError as error:
            log.warning("%s cannot be loaded (%s)", path, error)
    log.warning("C++ kernels are not built (no compiler at install time?): decoding on CPU will be slower")
    return None


def native() -> Native:
    """The library, for callers that have asked whether it is there."""
    library = load()
    assert library is not None, "the C++ kernels are not built"
    return library
