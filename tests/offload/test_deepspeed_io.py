"""Reading through DeepSpeed's handle, and what is said where there is none. DeepSpeed itself is not needed."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expert_cache.storage.direct_io import BLOCK_BYTES
from expert_cache.storage.errors import ExpertReadError
from moe_serve.errors import ConfigError
from moe_serve.offload import deepspeed_io
from moe_serve.offload.deepspeed_io import DeepSpeedFile


class FakeHandle:
    """Reads as DeepSpeed's does: whole buffers, by file name."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def sync_pread(self, buffer: torch.Tensor, filename: str, file_offset: int) -> int:
        self.offsets.append(file_offset)
        with open(filename, "rb") as file:
            data = os.pread(file.fileno(), buffer.numel(), file_offset)
        if len(data) < buffer.numel():
            return -1
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return 1


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Of the file `experts` in tmp_path: three blocks and a bit."""
    data = os.urandom(3 * BLOCK_BYTES + 100)
    (tmp_path / "experts").write_bytes(data)
    return data


def test_reads_come_from_the_handle_but_for_the_end_of_the_file(tmp_path: Path, content: bytes) -> None:
    handle = FakeHandle()
    file = DeepSpeedFile(tmp_path / "experts", handle)
    memory = memoryview(mmap.mmap(-1, 2 * BLOCK_BYTES))
    file.read(memory, BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert bytes(memory) == content[BLOCK_BYTES : 3 * BLOCK_BYTES]
    file.read(memory[:BLOCK_BYTES], 3 * BLOCK_BYTES, 100)
    assert bytes(memory[:100]) == content[3 * BLOCK_BYTES :]
    assert handle.offsets == [BLOCK_BYTES]
    file.close()


def test_a_read_that_cannot_begin_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = DeepSpeedFile(tmp_path / "experts", FakeHandle())
    (tmp_path / "experts").write_bytes(content[:BLOCK_BYTES])
    with pytest.raises(ExpertReadError, match=f"could not read at byte {BLOCK_BYTES}"):
        file.read(memoryview(mmap.mmap(-1, BLOCK_BYTES)), BLOCK_BYTES, BLOCK_BYTES)
    file.close()


class Builder:
    """DeepSpeed's AsyncIOBuilder on some machine."""

    def __init__(self, compatible: bool) -> None:
        self._compatible = compatible

    def is_compatible(self) -> bool:
        return self._compatible

    def load(self, verbose: bool) -> Any:
        raise RuntimeError("undefined symbol: io_submit")


@pytest.mark.parametrize(
    ("builders", "said"),
    [
        (None, "pip install 'moe-serve"),
        (SimpleNamespace(AsyncIOBuilder=lambda: Builder(False)), "install libaio-dev"),
        (SimpleNamespace(AsyncIOBuilder=lambda: Builder(True)), "undefined symbol: io_submit"),
    ],
)
def test_where_it_is_not_built_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch, builders: Any, said: str) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", builders)
    with pytest.raises(ConfigError, match="--moe-io deepspeed") as refusal:
        deepspeed_io.opener("experts")
    assert said in str(refusal.value)


def test_without_checksums_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="--moe-expert-file"):
        deepspeed_io.opener(None)
