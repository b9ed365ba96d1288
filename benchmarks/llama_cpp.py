"""llama.cpp as a side of the benchmarks: its programs are given, never installed or fetched.

`tree` is a llama.cpp source tree, built in a folder of its own for this CPU, or for a lesser one:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build -j
    cmake -B build-avx2 -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON

Targets: llama-bench, llama-batched-bench, llama-quantize, llama-server. The converter needs sentencepiece beside torch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONVERTER = Path(__file__).parent / "convert_to_gguf.py"
PRE_TOKENIZER = "gpt-2"
"""How the demo model's tokenizer, which random checkpoints have, cuts text: the converter does not know it."""
CONTEXT_SLACK = 8
"""Tokens that llama-batched-bench wants per sequence beyond prompt and answer."""


@dataclass(frozen=True)
class LlamaCpp:
    """A built tree; `build` is the folder's name inside it."""

    tree: Path
    build: str
    threads: int

    def program(self, name: str) -> Path:
        file = self.tree / self.build / "bin" / name
        if not file.is_file():
            raise SystemExit(f"{file} is missing: build llama.cpp first (see benchmarks/llama_cpp.py)")
        return file

    def version(self) -> str:
        """What the build says of itself, with its CPU features."""
        done = subprocess.run([self.program("llama-bench"), "--version"], capture_output=True, text=True)
        found = re.search(r"version: .*", done.stderr + done.stdout)
        return found[0] if found else "unknown"

    def convert(self, folder: Path, kind: str) -> Path:
        """The checkpoint as GGUF of this kind (bf16, q8_0, q4_k_m), made once beside it."""
        bf16 = folder / "bf16.gguf"
        if not bf16.is_file():
            files = [folder, "--outtype", "bf16", "--outfile", bf16]
            _run([sys.executable, CONVERTER, self.tree, PRE_TOKENIZER, *files])
        if kind == "bf16":
            return bf16
        file = folder / f"{kind}.gguf"
        if not file.is_file():
            _run([self.program("llama-quantize"), bf16, file, kind.upper()])
        return file

    def decode(self, gguf: Path, width: int, prompt: int, new_tokens: int) -> float:
        """Tokens/s of `width` sequences that decode together after prompts of `prompt` tokens."""
        tokens = width * (prompt + new_tokens + CONTEXT_SLACK)
        sizes = ["-npp", prompt, "-ntg", new_tokens, "-npl", width, "-c", tokens]
        out = self._measure("llama-batched-bench", gguf, *sizes, "--output-format", "jsonl")
        rows = [line for line in out.splitlines() if line.startswith("{")]
        return float(json.loads(rows[-1])["speed_tg"])

    def prefill(self, gguf: Path, prompt: int) -> float:
        """Prompt tokens/s of one prompt, in llama-bench's default chunks."""
        out = self._measure("llama-bench", gguf, "-p", prompt, "-n", 0, "-r", 1, "-o", "json")
        return float(json.loads(out)[0]["avg_ts"])

    def _measure(self, name: str, gguf: Path, *arguments: Any) -> str:
        return _run([self.program(name), "-m", gguf, "-t", self.threads, *arguments])


def _run(command: list[Any]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout)[-2000:]
        raise SystemExit(f"{' '.join(map(str, command))} ended with status {done.returncode}: {said}")
    return done.stdout
