"""PrefixFolder: what is written comes back; what is damaged or foreign does not; the budget holds."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_serve.prefix_disk.files import HEADER, Kind
from moe_serve.prefix_disk.fingerprint import fingerprint
from moe_serve.prefix_disk.folder import PrefixFolder
from moe_serve_base.whole_files import OutputError

MODEL, OTHER = b"m" * 16, b"o" * 16
PAYLOAD = bytes(range(200))
FILE_BYTES = HEADER.size + len(PAYLOAD)


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def opened(path: Path, model: bytes = MODEL, files: int = 4) -> PrefixFolder:
    return PrefixFolder(path, model, files * FILE_BYTES)


def fill(folder: PrefixFolder, *numbers: int) -> None:
    for number in numbers:
        folder.write(Kind.PAGE, digest(number), memoryview(PAYLOAD))


def read(folder: PrefixFolder, number: int, kind: Kind = Kind.PAGE) -> bytes | None:
    found = bytearray(len(PAYLOAD))
    return bytes(found) if folder.read(kind, digest(number), memoryview(found)) else None


def file_of(folder: PrefixFolder, number: int) -> Path:
    return folder.path / f"{digest(number).hex()}.page"


def test_a_new_process_finds_what_was_written(tmp_path: Path) -> None:
    fill(opened(tmp_path), 1, 2)
    again = opened(tmp_path)
    assert read(again, 1) == read(again, 2) == PAYLOAD
    assert again.totals.num_bytes == 2 * FILE_BYTES
    assert again.totals.read_bytes == 2 * FILE_BYTES
    assert not again.has(Kind.STATE, digest(1))


def test_another_models_files_are_not_found_and_stay_within_the_budget(tmp_path: Path) -> None:
    fill(opened(tmp_path), 1)
    other = opened(tmp_path, OTHER)
    fill(other, 2, 3)
    assert not other.has(Kind.PAGE, digest(1))
    assert read(opened(tmp_path), 1) == PAYLOAD


def test_the_budget_is_that_of_all_models_and_the_oldest_of_others_go_first(tmp_path: Path) -> None:
    old = opened(tmp_path, b"a" * 16)
    fill(old, 1)
    older = opened(tmp_path)
    fill(older, 1, 2)
    for number, seconds in ((1, 100), (2, 300)):
        os.utime(file_of(older, number), (seconds, seconds))
    os.utime(file_of(old, 1), (200, 200))
    new = opened(tmp_path, OTHER, files=4)
    fill(new, 1)
    fill(new, 2)
    assert not file_of(older, 1).exists()
    fill(new, 3)
    assert not old.path.exists()
    assert file_of(older, 2).exists()
    fill(new, 4, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.path.name]
    assert new.totals.num_bytes == 4 * FILE_BYTES
    assert not new.has(Kind.PAGE, digest(1))


def test_what_is_not_of_this_cache_stays(tmp_path: Path) -> None:
    fill(opened(tmp_path), 1)
    kept = [tmp_path / "notes" / file_of(opened(tmp_path), 1).name, opened(tmp_path).path / "note.txt"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PAYLOAD)
    fill(opened(tmp_path, OTHER, files=1), 1, 2)
    assert [path.exists() for path in kept] == [True, True]


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    fill(folder, 1)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert file_of(folder, 1).stat().st_mode & 0o777 == 0o600


def _flip(content: bytearray) -> None:
    content[-1] ^= 1


def _flip_header(content: bytearray) -> None:
    content[30] ^= 1


def _cut(content: bytearray) -> None:
    del content[-7:]


def _cut_header(content: bytearray) -> None:
    del content[20:]


def _lengthen(content: bytearray) -> None:
    content += b"more"


@pytest.mark.parametrize("harm", [_flip, _flip_header, _cut, _cut_header, _lengthen])
def test_a_damaged_file_is_ignored_and_removed_with_one_line(
    harm: Callable[[bytearray], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = opened(tmp_path)
    fill(folder, 1)
    content = bytearray(file_of(folder, 1).read_bytes())
    harm(content)
    file_of(folder, 1).write_bytes(content)
    with caplog.at_level(logging.WARNING, "moe_serve"):
        assert read(folder, 1) is None
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"{file_of(folder, 1)} is ignored and removed"
    ]
    assert not file_of(folder, 1).exists()
    assert folder.totals.refused_files == 1
    assert not folder.has(Kind.PAGE, digest(1))


@pytest.mark.parametrize("content", [b"", b"somebody else's", b"moe-kv\r\n\xff\xff" + bytes(100)])
def test_a_foreign_file_is_ignored_and_left(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last one is of another version of the format."""
    file_of(opened(tmp_path), 1).write_bytes(content)
    folder = opened(tmp_path)
    with caplog.at_level(logging.WARNING, "moe_serve"):
        assert read(folder, 1) is None
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [f"{file_of(folder, 1)} is ignored"]
    assert file_of(folder, 1).exists()


def test_a_file_under_anothers_name_is_refused(tmp_path: Path) -> None:
    """Else one prompt would read another's keys and values."""
    folder = opened(tmp_path)
    fill(folder, 1)
    file_of(folder, 1).rename(file_of(folder, 2))
    assert read(opened(tmp_path), 2) is None


def test_files_with_other_names_are_not_touched(tmp_path: Path) -> None:
    note = opened(tmp_path).path / "note.txt"
    note.write_text("mine")
    fill(opened(tmp_path, files=1), 1, 2, 3)
    assert note.read_text() == "mine"


def test_the_least_recently_used_files_go_first_and_a_prefix_loses_its_end(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    fill(folder, 1, 2, 3)
    folder.touch([(Kind.PAGE, digest(1)), (Kind.PAGE, digest(2))])
    fill(folder, 4, 5, 6)
    left = [number for number in range(1, 7) if folder.has(Kind.PAGE, digest(number))]
    assert left == [1, 4, 5, 6]
    assert folder.totals.num_bytes == 4 * FILE_BYTES
    assert len(list(folder.path.iterdir())) == 4


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    fill(folder, 1, 2, 3)
    for number, seconds in ((1, 300), (2, 100), (3, 200)):
        os.utime(file_of(folder, number), (seconds, seconds))
    fill(opened(tmp_path, files=3), 4)
    assert not file_of(folder, 2).exists()
    assert file_of(folder, 1).exists()


def test_a_full_disk_ends_writing_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path)

    def refuse(path: Path, head: bytes, payload: memoryview) -> None:
        raise OutputError(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(folder, "_write", refuse)
    with caplog.at_level(logging.WARNING, "moe_serve"):
        fill(folder, 1, 2, 3)
    assert [record.getMessage() for record in caplog.records] == [
        f"prefixes are no longer written to {folder.path}: the disk is full"
    ]
    assert not folder.has(Kind.PAGE, digest(1))


def test_a_fingerprint_follows_content_time_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1 << 20))
    os.utime(file, (1, 1))
    first = fingerprint([file], {"dtype": "float32"})
    assert fingerprint([file], {"dtype": "float32"}) == first
    assert fingerprint([file], {"dtype": "bfloat16"}) != first
    os.utime(file, (2, 2))
    assert fingerprint([file], {"dtype": "float32"}) != first
    file.write_bytes(bytes((1 << 20) - 1) + b"x")
    os.utime(file, (1, 1))
    assert fingerprint([file], {"dtype": "float32"}) != first
