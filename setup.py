"""Builds the C++ kernels where a compiler exists; everything else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so it is tied to no Python or torch
version. Without a compiler the installation still succeeds and torch's own kernels are used.
"""

from setuptools import Extension, setup

HERE = "kernels/moe_serve_kernels/cpu"

setup(
    ext_modules=[
        Extension(
            "moe_serve_kernels.cpu._native",
            sources=[f"{HERE}/linear_rows.cpp", f"{HERE}/paged_attention.cpp"],
            depends=[
                f"{HERE}/{name}"
                for name in ("vectors.h", "horizontal_sum.inc", "linear_rows.inc", "paged_attention.inc")
            ],
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-ffast-math", "-fno-finite-math-only"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
