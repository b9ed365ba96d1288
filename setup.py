"""Builds the C++ kernels where a compiler exists; everything else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so it is tied to no Python or torch
version. Without a compiler the installation still succeeds and torch's own kernels are used.
"""

from glob import glob

from setuptools import Extension, setup

HERE = "kernels/moe_serve_kernels/cpu"

setup(
    ext_modules=[
        Extension(
            "moe_serve_kernels.cpu._native",
            sources=[f"{HERE}/{name}.cpp" for name in ("decode_step", "expert_mlp", "paged_attention")],
            depends=glob(f"{HERE}/*.inc") + glob(f"{HERE}/*.h"),
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-ffast-math", "-fno-finite-math-only", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
