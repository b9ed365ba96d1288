"""Builds the C++ kernels where a compiler exists; everything else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so it is tied to no Python or torch
version, and one wheel serves them all. Without a compiler the installation still succeeds and torch's
own kernels are used.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = "kernels/moe_serve_kernels/cpu/native"
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-Wno-psabi"]
# Of -ffast-math only what leaves the order of sums as it is written: a token's bits depend on it.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"]


class BuildInParallel(build_ext):
    """Compiles the sources of an extension side by side."""

    def build_extension(self, ext: Extension) -> None:
        compile_in_turn = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extension(ext)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for one platform and any Python 3: the library uses nothing of Python's C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildInParallel, "bdist_wheel": AnyPythonWheel},
    ext_modules=[
        Extension(
            "moe_serve_kernels.cpu._native",
            sources=sorted(glob(f"{HERE}/*/*.cpp")),
            depends=glob(f"{HERE}/*/*.inc") + glob(f"{HERE}/*/*.h"),
            include_dirs=[HERE],
            language="c++",
            extra_compile_args=[*FLAGS],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
)
