"""Reading a GGUF file's metadata and table of tensors, by the `gguf` package's reader. Reads no tensor's contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor

from moe_serve.errors import CheckpointError

ARCHITECTURE = "general.architecture"
MAGIC = b"GGUF"
"""The first bytes of a file."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place."""

    name: str
    type: str
    """ggml's name, such as F32 or Q4_K."""
    shape: tuple[int, ...]
    """In values, as torch orders dimensions: columns last."""
    file: int
    """Index among the checkpoint's files."""
    offset: int
    """Bytes from the start of the file."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """What a GGUF checkpoint says of itself."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    """By name."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.metadata.get(ARCHITECTURE))


def read(files: Sequence[Path]) -> Gguf:
    """Metadata is that of the first file. CheckpointError names a file that is no GGUF file or is cut off."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        try:
            with np.errstate(over="raise"):
                reader = GGUFReader(file)
            if number == 0:
                metadata = {name: field.contents() for name, field in reader.fields.items()}
            tensors |= {tensor.name: _place(tensor, number) for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, OSError, FloatingPointError) as error:
            raise CheckpointError(f"{file}: cut off, or not a GGUF file ({error})") from error
    return Gguf(metadata, tensors)


def header_end(file: Path, num_known: int) -> int | None:
    """Bytes before the tensors' contents; None if the `num_known` first bytes of the file do not hold all of them.

    What follows these bytes may be anything.
    """
    try:
        with np.errstate(over="raise"):
            end = int(GGUFReader(file).data_offset)
    except (ValueError, IndexError, KeyError, OSError, FloatingPointError):
        return None
    return end if end <= num_known else None


def _place(tensor: ReaderTensor, file: int) -> GgufTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return GgufTensor(tensor.name, tensor.tensor_type.name, shape, file, int(tensor.data_offset))
