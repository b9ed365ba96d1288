"""What the C++ library says of itself: structs, enums, constants and signatures of functions.

The compiler that built the library wrote these down (native/contract/layout.cpp), so Python repeats no order of
fields, no number of an enum and no list of arguments. Knows ctypes; knows no kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS: dict[str, Any] = {
    "P": ctypes.c_void_p,
    "q": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "?": ctypes.c_bool,
    "v": None,
}


class LayoutError(Exception):
    """The library and this Python code do not belong together; the message names the field, value or function."""


@dataclass(frozen=True, slots=True)
class Signature:
    """A function's types, as ctypes has them."""

    result: Any
    arguments: list[Any]


@dataclass(slots=True)
class Layout:
    """Everything by its name in C++; values of an enum as ENUM.VALUE."""

    structs: dict[str, type[ctypes.Structure]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)
    functions: dict[str, Signature] = field(default_factory=dict)
    isa: str = ""
    """The instruction set that the kernels use here: amx (AVX-512 with bf16 tiles), avx512, avx2 or generic."""


def parse(text: str) -> Layout:
    """`text` as moe_serve_layout writes it. LayoutError where ctypes would lay a struct out in another way."""
    layout = Layout()
    lines = [line.split() for line in text.splitlines()]
    for at, (what, name, *rest) in enumerate(lines):
        if what == "struct":
            layout.structs[name] = _struct(name, int(rest[0]), list(_fields_after(lines, at)), layout.structs)
        elif what == "value":
            layout.values[name] = int(rest[0])
        elif what == "function":
            result, *arguments = (KINDS[kind] for kind in rest)
            layout.functions[name] = Signature(result, arguments)
        elif what == "isa":
            layout.isa = name
    return layout


def filled(struct: type[ctypes.Structure], values: Mapping[str, Any]) -> ctypes.Structure:
    """A struct with all of its fields given by name. LayoutError for one that is unknown or left out."""
    names = {name for name, *_ in struct._fields_}
    for name in values.keys() - names:
        raise LayoutError(f"the C++ library's {struct.__name__} has no field {name}")
    for name in names - values.keys():
        raise LayoutError(f"the C++ library's {struct.__name__}.{name} is not given")
    return struct(**values)


def _fields_after(lines: list[list[str]], at: int) -> Iterator[tuple[str, str, int]]:
    for what, name, *rest in lines[at + 1 :]:
        if what != "field":
            return
        yield name, rest[0], int(rest[1])


def _struct(
    name: str, num_bytes: int, fields: list[tuple[str, str, int]], known: Mapping[str, type[ctypes.Structure]]
) -> type[ctypes.Structure]:
    # Without __slots__ a misspelt field would become an attribute of Python's.
    members = {"_fields_": [(each, KINDS.get(kind) or known[kind]) for each, kind, _ in fields], "__slots__": ()}
    struct = type(name, (ctypes.Structure,), members)
    for each, _, offset in fields:
        here = getattr(struct, each).offset
        if here != offset:
            raise LayoutError(f"{name}.{each} is at byte {offset} in the C++ library and at byte {here} in ctypes")
    if ctypes.sizeof(struct) != num_bytes:
        raise LayoutError(f"{name} has {num_bytes} bytes in the C++ library and {ctypes.sizeof(struct)} in ctypes")
    return struct
