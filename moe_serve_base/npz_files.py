"""Reading .npz files that anybody may have written: names, types and sizes are checked before anything is unpacked.

A header may promise 10^11 rows, and 2 MB may unpack to gigabytes. Nothing is unpickled. Knows no arrays' meaning.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ENDING = ".npy"


class NpzError(ValueError):
    """A file that cannot be read. `field`: the array that is to blame, or "file"."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Header:
    """What an array's own header says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """An open file, for `with`. Every method raises NpzError."""

    def __init__(self, path: str) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise NpzError("file", "does not exist; check the path") from None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise _unreadable(error) from None
        self.names = sorted(name.removesuffix(ENDING) for name in self._zip.namelist() if name.endswith(ENDING))

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def require(self, names: Sequence[str], what: str) -> None:
        """`what` the file should be, in words, for the message about a missing array."""
        missing = [name for name in names if name not in self.names]
        if missing:
            found = ", ".join(self.names) or "nothing"
            raise NpzError(missing[0], f"missing; {what} has {', '.join(names)}, this file has {found}")

    def header(self, name: str) -> Header:
        """Checked against the size that the archive names."""
        try:
            with self._zip.open(name + ENDING) as stream:
                version = np.lib.format.read_magic(stream)
                if version not in ((1, 0), (2, 0)):
                    raise ValueError(f"version {version} of numpy's format")
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
                start = stream.tell()
        except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            raise _unreadable(error) from None
        header = Header(shape, dtype)
        if dtype.hasobject:
            raise NpzError("file", f"{name} holds pickled objects, which are not read; save numbers")
        stored = self._zip.getinfo(name + ENDING).file_size - start
        if header.num_bytes != stored:
            raise NpzError(
                name, f"its header says {header.num_bytes} bytes, but the file holds {stored}; copy it again"
            )
        return header

    def read(self, name: str) -> Array:
        """The whole array."""
        self.header(name)
        try:
            with self._zip.open(name + ENDING) as stream:
                return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
        except MemoryError:
            raise NpzError(name, "does not fit into memory; give a smaller one") from None
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise _unreadable(error) from None


def _unreadable(error: Exception) -> NpzError:
    return NpzError("file", f"cannot be read as .npz without pickles ({error}); save it again")
