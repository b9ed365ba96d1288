"""llama.cpp in this process: its ids of a text, its greedy tokens, its quantiser (llama_greedy.cpp)."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {"f32": 0, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "q2_k": 10, "q3_k_m": 12, "iq4_xs": 30, "q4_0": 2}
"""llama.cpp's numbers (`enum llama_ftype`). f32 dequantises."""
TEXT_ROOM = 4096
"""Tokens of a text."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and by how much each one's logit leads the next."""

    ids: list[int]
    margins: list[float]


class Peer:
    """The library, compiled against a built tree."""

    def __init__(self, tree: Path, build: str, threads: int) -> None:
        self._library = _compiled(tree, tree / build)
        self._threads = threads

    def quantize(self, source: Path, target: Path, kind: str) -> None:
        if self._library.peer_quantize(str(source).encode(), str(target).encode(), KINDS[kind]):
            raise SystemExit(f"llama.cpp cannot make {kind} of {source}")

    def open(self, gguf: Path) -> Loaded:
        handle = self._library.peer_open(str(gguf).encode(), self._threads)
        if not handle:
            raise SystemExit(f"llama.cpp cannot load {gguf}")
        return Loaded(self._library, handle)


class Loaded:
    """A GGUF file in llama.cpp; a context manager, which closes it."""

    def __init__(self, library: Any, handle: int) -> None:
        self._library, self._handle = library, handle

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *error: object) -> None:
        self._library.peer_close(self._handle)

    def chat_template(self) -> str | None:
        found = self._library.peer_template(self._handle)
        return None if found is None else str(found.decode())

    def tokens(self, text: str) -> list[int]:
        """With the tokens that the file wants around a text."""
        data = text.encode()
        ids = (ctypes.c_int32 * TEXT_ROOM)()
        count = self._library.peer_tokens(self._handle, data, len(data), ids, TEXT_ROOM)
        return ids[:count]

    def greedy(self, prompt: Sequence[int], count: int) -> Answer:
        ids, margins = (ctypes.c_int32 * count)(), (ctypes.c_float * count)()
        given = (ctypes.c_int32 * len(prompt))(*prompt)
        if error := self._library.peer_greedy(self._handle, given, len(prompt), count, ids, margins):
            raise SystemExit(f"llama.cpp's llama_decode returned {error}")
        return Answer(ids[:], margins[:])


def _compiled(tree: Path, build: Path) -> Any:
    library = Path(tempfile.mkdtemp()) / "llama_greedy.so"
    needed = [build / "bin" / f"lib{name}.so" for name in ("llama", "ggml", "ggml-base")]
    if missing := [str(file) for file in needed if not file.is_file()]:
        raise SystemExit(f"{', '.join(missing)} missing: build llama.cpp first (see benchmarks/llama_cpp.py)")
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", str(Path(__file__).parent / "llama_greedy.cpp")]
    command += [f"-I{tree / 'include'}", f"-I{tree / 'ggml' / 'include'}", *map(str, needed)]
    subprocess.run([*command, f"-Wl,-rpath,{build / 'bin'}", "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    loaded.peer_open.argtypes, loaded.peer_open.restype = [ctypes.c_char_p, number], pointer
    loaded.peer_close.argtypes, loaded.peer_close.restype = [pointer], None
    loaded.peer_template.argtypes, loaded.peer_template.restype = [pointer], ctypes.c_char_p
    loaded.peer_tokens.argtypes = [pointer, ctypes.c_char_p, number, pointer, number]
    loaded.peer_greedy.argtypes = [pointer, pointer, number, number, pointer, pointer]
    loaded.peer_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, number]
    return loaded
