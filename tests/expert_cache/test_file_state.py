"""An open file has changed when its bytes have, not when only its times have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.file_state import NUM_BLOCKS, WHOLE_BYTES, FileState

SIZES = [100, 5000, 3 * WHOLE_BYTES + 1]


@pytest.fixture(params=SIZES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(request.param))
    os.utime(file, (1, 1))
    return file


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def opened(request: pytest.FixtureRequest, path: Path) -> Iterator[DirectFile]:
    file = DirectFile(path, direct=request.param)
    yield file
    file.close()


def overwrite(path: Path, offset: int, raw: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        stream.write(raw)


HARMLESS: dict[str, Callable[[Path], object]] = {
    "touch": lambda path: path.touch(),
    "old time": lambda path: os.utime(path, (2, 2)),
    "permissions": lambda path: path.chmod(0o444),
    "hard link": lambda path: path.with_name("link").hardlink_to(path),
    "renamed": lambda path: path.rename(path.with_name("other")),
    "removed": lambda path: path.unlink(),
    "the same bytes": lambda path: overwrite(path, 0, path.read_bytes()[:50]),
}
HARM: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: overwrite(path, 0, bytes([path.read_bytes()[0] ^ 1])),
    "last byte": lambda path: overwrite(path, -1, bytes([path.read_bytes()[-1] ^ 1])),
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "other bytes": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_other_times_are_no_change(what: str, opened: DirectFile) -> None:
    HARMLESS[what](opened.path)
    opened.check_unchanged()
    opened.check_unchanged()


@pytest.mark.parametrize("what", HARM)
def test_other_bytes_are(what: str, opened: DirectFile) -> None:
    HARM[what](opened.path)
    for _ in range(2):
        with pytest.raises(ExpertReadError, match="changed while it was in use"):
            opened.check_unchanged()


def test_a_time_set_back_hides_no_write(path: Path, opened: DirectFile) -> None:
    """As `rsync --inplace --times` leaves a file."""
    HARM["first byte"](path)
    os.utime(path, (1, 1))
    with pytest.raises(ExpertReadError):
        opened.check_unchanged()


def test_bytes_that_change_later_are_noticed_after_a_touch(path: Path, opened: DirectFile) -> None:
    path.touch()
    opened.check_unchanged()
    HARM["last byte"](path)
    with pytest.raises(ExpertReadError):
        opened.check_unchanged()


def test_an_unchanged_file_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs before each step: it costs one fstat."""
    reads: list[int] = []
    real = os.preadv

    def counted(descriptor: int, buffers: list[object], offset: int) -> int:
        reads.append(offset)
        return real(descriptor, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr("expert_cache.storage.file_state.os.preadv", counted)
    with path.open("rb") as stream:
        state = FileState(stream.fileno())
        most = max(NUM_BLOCKS, WHOLE_BYTES // os.sysconf("SC_PAGESIZE"))
        assert 0 < len(reads) <= most
        reads.clear()
        assert state.is_unchanged()
        assert reads == []
