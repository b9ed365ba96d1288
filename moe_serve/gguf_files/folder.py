"""A GGUF checkpoint as a Hugging Face folder: config, tokenizer and a listing of tensors, made once and then found.

The folder lies in the user's cache and holds no weights. `tensors.json` says where in which file each tensor is, so a
later start need not read the vocabulary that a GGUF file has before its tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.gguf_files.architectures import config_of
from moe_serve.gguf_files.fields import Fields
from moe_serve.gguf_files.paths import LISTING, name_of, parts_of
from moe_serve.gguf_files.reading import Gguf, GgufTensor, read
from moe_serve_base.whole_files import whole_folder

NO_TOKENIZER = "no_tokenizer.txt"
"""Why there is no tokenizer.json in the folder."""
VERSION = 1
"""To be raised where a folder made before would be read wrongly."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Where a GGUF checkpoint's tensors lie."""

    architecture: str
    files: tuple[Path, ...]
    tensors: dict[str, GgufTensor]
    """By name."""

    @property
    def fingerprint(self) -> str:
        """Identifies the checkpoint by names, types, shapes and places, not by its contents."""
        places = [dataclasses.astuple(tensor) for tensor in self.tensors.values()]
        return hashlib.sha256(json.dumps([[file.name for file in self.files], places]).encode()).hexdigest()


def folder_of(file: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder for the checkpoint that `file` is, or is a part of; made where it is missing. ConfigError."""
    files = [part.resolve() for part in parts_of(file)]
    folder = _cache(environment) / _digest(files) / name_of(file)
    if not folder.is_dir():
        gguf = read(files)
        config = config_of(Fields(gguf, str(file)))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(folder) as partial:
                _fill(partial, files, gguf, config)
        except FileExistsError:
            pass  # another process was first
        except OSError as error:
            if not folder.is_dir():
                raise ConfigError(f"{file}: {error}; XDG_CACHE_HOME names another place") from error
    return folder


def listing_in(folder: str | Path) -> Listing | None:
    """The listing in a folder that `folder_of` made, None for another folder. CheckpointError: a file has changed."""
    path = Path(folder) / LISTING
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    files = tuple(Path(file) for file in found["files"])
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this file is gone; give the path where it is now")
    rows = (GgufTensor(row[0], row[1], tuple(row[2]), row[3], row[4]) for row in found["tensors"])
    return Listing(found["architecture"], files, {tensor.name: tensor for tensor in rows})


def _cache(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-serve" / "gguf"


def _digest(files: Sequence[Path]) -> str:
    """Of names, sizes and times: a changed file gets a new folder."""
    states = [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([VERSION, states]).encode()).hexdigest()[:12]


def _fill(folder: Path, files: Sequence[Path], gguf: Gguf, config: dict[str, Any]) -> None:
    from moe_serve.gguf_files.tokenizer import write_tokenizer  # imports transformers, which takes seconds

    rows = [dataclasses.astuple(tensor) for tensor in gguf.tensors.values()]
    listing = {"architecture": gguf.architecture, "files": [str(file) for file in files], "tensors": rows}
    (folder / LISTING).write_text(json.dumps(listing), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    try:
        write_tokenizer(files[0], folder)
    except CheckpointError as error:  # the model can still run with another tokenizer
        (folder / NO_TOKENIZER).write_text(str(error), encoding="utf-8")
