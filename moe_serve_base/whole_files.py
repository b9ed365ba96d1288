"""Files written whole: first beside their name, then moved over it, so that a failed write costs no old file.

Every file that a user asks for goes through `whole_file` or `whole_folder`. `refusal` is asked before long work, so
that a typing error does not cost the result.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(OSError):
    """A file that cannot be written. The message is one line and names it."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written ({self.strerror})"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what shall appear under `path` when all of it is there; gone where anything fails.

    Devices and pipes, such as /dev/stdout, are written directly. OutputError where the system refuses.
    """
    path = Path(path)
    direct = path.exists() and not path.is_file() and not path.is_dir()
    target = path.resolve()  # a link stays one
    partial = path if direct else target.with_name(_partial_name(target))
    try:
        yield partial
        if not direct:
            partial.replace(target)
    except OSError as error:
        raise error if isinstance(error, OutputError) else OutputError(path, error) from error
    finally:
        if not direct:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a new folder full of files; `path` must not exist."""
    partial = path.with_name(_partial_name(path))
    try:
        partial.mkdir()
        yield partial
        partial.rename(path)
    except OSError as error:
        raise OutputError(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """As UTF-8, whole. OutputError where it cannot be written."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def refusal(path: Path, replace: bool = False) -> str | None:
    """Why `path` cannot be written, in words that follow its name; None where it can. Asked before long work.

    `replace`: a file that exists may be overwritten.
    """
    if path.is_dir():
        return "exists and is a folder; choose another name"
    if path.exists() and not path.is_file():
        return None  # a device
    if path.exists() and not replace:
        return "exists; choose another name, or replace it with --force"
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"cannot be written: its folder does not exist; create {folder} first"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"cannot be written: no permission for the folder {folder}"
    return None


def _partial_name(path: Path) -> str:
    """Beside `path`, on the same file system, and no other writer's."""
    return f".{path.name}.{secrets.token_hex(4)}.partial"
