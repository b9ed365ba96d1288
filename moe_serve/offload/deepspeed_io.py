"""Reading experts through DeepSpeed's asynchronous I/O (libaio), where it is built.

DeepSpeed counts the reads that have come back and does not look at what became of them: one that failed leaves what
was in memory before. So this is for expert files only, whose experts carry checksums (`moe-serve pack`). Parts it
cannot read, the last bytes of a file, are read directly. Knows DeepSpeed; knows no experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.errors import ExpertReadError
from moe_serve.errors import ConfigError

BLOCK_BYTES = 1 << 20
QUEUE_DEPTH = 32


class Handle(Protocol):
    """The part of DeepSpeed's aio_handle that is used. Threads take turns in it."""

    def sync_pread(self, buffer: torch.Tensor, filename: str, file_offset: int) -> int:
        """Fill a tensor from a place in a file; 1 when it is done, -1 when it could not begin."""
        ...


class DeepSpeedFile(DirectFile):
    """As DirectFile, read through a handle."""

    def __init__(self, path: Path, handle: Handle) -> None:
        super().__init__(path)
        self._handle = handle
        self._size = path.stat().st_size

    def read(self, memory: memoryview, offset: int, needed: int) -> None:
        """As DirectFile.read; a read that failed is not noticed here, but by the expert's checksum."""
        if offset + len(memory) > self._size:
            super().read(memory, offset, needed)
            return
        if self._handle.sync_pread(torch.frombuffer(memory, dtype=torch.uint8), str(self.path), offset) != 1:
            raise ExpertReadError(f"{self.path}: DeepSpeed could not read at byte {offset}")


def opener(expert_file: str | None) -> Callable[[Path], DirectFile]:
    """What opens files for a Fetcher. ConfigError says what is missing."""
    if expert_file is None:
        raise ConfigError(
            "--moe-io deepspeed does not notice failed reads; give --moe-expert-file, whose experts have checksums"
        )
    handle = _library().aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, 1)
    return lambda path: DeepSpeedFile(path, handle)


def _library() -> Any:
    """DeepSpeed's compiled module; it compiles it when that has not been done, which takes minutes."""
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder
    except ImportError as error:
        raise ConfigError("--moe-io deepspeed: install it with pip install 'moe-serve-engine[distributed]'") from error
    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        raise ConfigError(
            "--moe-io deepspeed: libaio or its headers are not here; install libaio-dev, or leave --moe-io at direct"
        )
    try:
        return builder.load(verbose=False)
    except Exception as error:  # compilers, linkers and loaders each have their own
        raise ConfigError(f"--moe-io deepspeed: DeepSpeed's async_io cannot be built or loaded ({error})") from error
