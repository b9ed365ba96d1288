"""The C++ library tells its structs, enums and signatures; what Python gets wrong is an error that names it."""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

import pytest

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.layout import LayoutError, parse

needs_library = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

TOLD = """\
struct Pair 16
field first P 0
field second q 8
struct Two 40
field one Pair 0
field other Pair 16
field share d 32
value MOST 6
value Colour.RED 0
function paint ? P q f
function wash v P
"""


def test_a_layout_is_read() -> None:
    layout = parse(TOLD)
    two = layout.structs["Two"]
    assert [name for name, *_ in two._fields_] == ["one", "other", "share"]
    assert ctypes.sizeof(two) == 40
    assert layout.values == {"MOST": 6, "Colour.RED": 0}
    paint = layout.functions["paint"]
    assert (paint.result, paint.arguments) == (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float])
    assert layout.functions["wash"].result is None


@pytest.mark.parametrize(
    ("line", "wrong", "named"),
    [
        ("field second q 8", "field second i 12", r"Pair\.second is at byte 12"),
        ("field share d 32", "field share d 24", r"Two\.share is at byte 24"),
        ("struct Two 40", "struct Two 48", "Two has 48 bytes"),
    ],
)
def test_a_struct_that_ctypes_would_lay_out_otherwise_is_refused(line: str, wrong: str, named: str) -> None:
    with pytest.raises(LayoutError, match=named):
        parse(TOLD.replace(line, wrong))


BIAS = {"data": None, "stride": 1, "bf16": 0}


@needs_library
def test_fields_are_given_by_name() -> None:
    bias = library.native().new("Bias", **BIAS)
    assert (bias.data, bias.stride, bias.bf16) == (None, 1, 0)


@needs_library
def test_a_field_that_c_does_not_have_is_named() -> None:
    with pytest.raises(LayoutError, match="Bias has no field strides"):
        library.native().new("Bias", **BIAS, strides=1)
    with pytest.raises(AttributeError, match="strides"):
        library.native().new("Bias", **BIAS).strides = 1


@needs_library
def test_a_field_that_python_forgets_is_named() -> None:
    with pytest.raises(LayoutError, match=r"Bias\.stride is not given"):
        library.native().new("Bias", data=None, bf16=0)


@needs_library
def test_values_and_functions_that_c_does_not_have_are_named() -> None:
    with pytest.raises(LayoutError, match=r"no value ActivationKind\.TANH"):
        library.native().value("ActivationKind.tanh")
    with pytest.raises(LayoutError, match="no function moe_serve_lunch"):
        library.native().moe_serve_lunch()


@needs_library
def test_arguments_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(ctypes.ArgumentError):
        library.native().moe_serve_linear(None, None, None, 1.5, 1)
    with pytest.raises(TypeError, match="at least 5"):
        library.native().moe_serve_linear(None, None)


def test_a_file_that_is_no_library_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "_native.so"
    path.write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"_native\.so"):
        library.Native(path)


@needs_library
def test_a_library_of_other_sources_says_how_to_build_it() -> None:
    math = ctypes.util.find_library("m")
    assert math is not None
    with pytest.raises(LayoutError, match="build it again"):
        library.Native(Path(math))
