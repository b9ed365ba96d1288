"""MODEL as the user wrote it becomes a checkpoint folder: a path, a GGUF file, or a model id.

Looks at names and at config.json only; reads no weights and imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from moe_serve.config.model_folder import CONFIG, cache_folder, refuse_foreign_weights
from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.hf.families import refuse_unknown_family
from moe_serve.hub.cache import find_cached, snapshot_of
from moe_serve.hub.offline import is_offline

MODEL_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<variant>[\w.-]+))?")
"""org/name, as on the Hugging Face Hub, and which of several GGUF files."""


def find_model(
    name: str, revision: str | None = None, offline: bool = False, environment: Mapping[str, str] = os.environ
) -> str:
    """The checkpoint folder for MODEL, with a config.json in it; a model id is downloaded unless the cache has it.

    `revision`: a branch, tag or commit of a model id. ConfigError and CheckpointError say what to do.
    """
    path = Path(name)
    if path.is_file():
        return _of_file(path, environment)
    if not path.is_dir():
        return _of_id(name, revision, offline or is_offline(environment), environment)
    if (path / CONFIG).is_file():
        return name
    snapshot = snapshot_of(path.parent if path.name == "snapshots" else path)
    return str(snapshot) if snapshot is not None else _of_folder(path, environment)


def _of_file(file: Path, environment: Mapping[str, str]) -> str:
    from moe_serve.gguf_files.folder import folder_of  # imports the gguf package, which help must not wait for

    if file.suffix != ".gguf":
        raise ConfigError(f"{file} is a file; give the folder of a Hugging Face checkpoint, or a .gguf file")
    return str(folder_of(file, environment))


def _of_folder(folder: Path, environment: Mapping[str, str]) -> str:
    """Of a folder without config.json."""
    from moe_serve.gguf_files.paths import only_gguf_in

    gguf = only_gguf_in(folder)
    if gguf is not None:
        return _of_file(gguf, environment)
    refuse_foreign_weights(folder)
    raise CheckpointError(f"{folder}: {CONFIG} is missing; this is not a Hugging Face checkpoint folder")


def _of_id(name: str, revision: str | None, offline: bool, environment: Mapping[str, str]) -> str:
    match = MODEL_ID.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name}: no such folder; give the path of a Hugging Face checkpoint folder, or a model id")
    model_id, variant = match["id"], match["variant"]
    found = find_cached(model_id, revision, variant, environment)
    if found is None and offline:
        raise ConfigError(
            f"{name}: no such folder, and the Hugging Face cache {cache_folder(environment)} does not hold all of"
            " such a model; without --offline (or HF_HUB_OFFLINE) it is downloaded"
        )
    if found is None:
        from moe_serve.hub.download import Repository

        found = Repository(model_id, revision, environment).download(variant, refuse_unknown_family)
    return _of_file(found, environment) if found.is_file() else str(found)
