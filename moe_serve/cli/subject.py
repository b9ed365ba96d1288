"""What the doctor is asked about: a checkpoint that is here, the outline of one that is not, or a config.json alone.

Looks at names, and fetches headers; imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_serve.cli import preflight
from moe_serve.config.model_folder import CONFIG, read_config_json
from moe_serve.errors import ConfigError
from moe_serve.gguf_files.paths import LISTING
from moe_serve.hf.families import refuse_unknown_family
from moe_serve.hub.cache import INDEX, find_cached
from moe_serve.hub.find import MODEL_ID
from moe_serve.hub.offline import is_offline

Known = Literal["all", "headers", "config"]
UNKNOWN = "MODEL"
SCHEMES = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint's folder, and how much of it is here."""

    name: str
    """What `serve` takes; MODEL where that is not known."""
    folder: str
    known: Known

    download_bytes: int = 0
    """Of the weights that are not here, as far as they are known."""

    @property
    def indexed_bytes(self) -> int | None:
        """What the index beside config.json says that all weights take, further layers and other towers included."""
        try:
            fields = json.loads((Path(self.folder) / INDEX).read_text(encoding="utf-8"))
            return int(fields["metadata"]["total_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


@contextmanager
def subject_of(
    name: str, revision: str | None = None, offline: bool = False, environment: Mapping[str, str] = os.environ
) -> Iterator[Subject]:
    """MODEL of the command line: as for `serve`, or a URL, a config.json, or a folder that holds only that.

    Of a model id that is not in the cache, only headers are fetched. ConfigError and its subclasses.
    """
    with tempfile.TemporaryDirectory(prefix="moe-serve-outline-") as scratch:
        into = Path(scratch) / "checkpoint"
        into.mkdir()
        yield _found(name, revision, offline or is_offline(environment), environment, into)


def _found(name: str, revision: str | None, offline: bool, environment: Mapping[str, str], into: Path) -> Subject:
    path, match = Path(name), MODEL_ID.fullmatch(name)
    if name.startswith(SCHEMES):
        if offline:
            raise ConfigError(f"{name} is on the network, which --offline (or HF_HUB_OFFLINE) forbids to ask")
        from moe_serve.hub.outline import outline_of_url  # imports httpx, which help must not wait for

        found = outline_of_url(name, revision, environment, refuse_unknown_family, into)
        return _outlined(UNKNOWN, found, environment, into)
    if path.suffix == ".json" and path.is_file():
        return _config_alone(path, into)
    if (path / CONFIG).is_file() and not any(path.glob("*.safetensors")) and not (path / LISTING).is_file():
        return _config_alone(path / CONFIG, into)
    if path.exists() or match is None or offline or find_cached(match["id"], revision, match["variant"], environment):
        return Subject(name, preflight.check_model(name, revision, offline), "all")
    from moe_serve.hub.outline import outline_of_id  # as above

    found = outline_of_id(match["id"], revision, match["variant"], environment, refuse_unknown_family, into)
    return _outlined(name, found, environment, into)


def _outlined(name: str, found: Path, environment: Mapping[str, str], into: Path) -> Subject:
    weights = [path for path in into.iterdir() if path.suffix in (".safetensors", ".gguf")]
    folder = _folder_of(found, environment, into)
    return Subject(name, folder, "headers", sum(path.stat().st_size for path in weights))


def _folder_of(found: Path, environment: Mapping[str, str], into: Path) -> str:
    """Of a GGUF file: the folder that stands for it, made beside the outline."""
    if found.is_dir():
        return str(found)
    from moe_serve.gguf_files.folder import folder_of  # imports the gguf package, which help must not wait for

    return str(folder_of(found, {**environment, "XDG_CACHE_HOME": str(into.parent)}))


def _config_alone(config: Path, into: Path) -> Subject:
    """A folder with the config, and the index beside it if there is one."""
    shutil.copy(config, into / CONFIG)
    if (config.parent / INDEX).is_file():
        shutil.copy(config.parent / INDEX, into / INDEX)
    refuse_unknown_family(read_config_json(str(into)))
    return Subject(UNKNOWN, str(into), "config")
