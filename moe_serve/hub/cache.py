"""What the Hugging Face cache holds of a model: the snapshot of a revision, and whether all of it is there.

Looks at names and at the index of shards; asks no network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_serve.config.model_folder import CACHE_PREFIX, CONFIG, cache_folder
from moe_serve.errors import ConfigError
from moe_serve.gguf_files.paths import PART, SUFFIX
from moe_serve.hub.wanted import wanted_files

INDEX = "model.safetensors.index.json"


def find_cached(
    model_id: str, revision: str | None, variant: str | None, environment: Mapping[str, str]
) -> Path | None:
    """A checkpoint's folder, or its first GGUF file; None where some of it is missing.

    `variant`: which of several GGUF files, such as Q4_K_M. No `revision`: main, else the newest.
    """
    snapshot = snapshot_of(cache_folder(environment) / (CACHE_PREFIX + model_id.replace("/", "--")), revision)
    if snapshot is None:
        return None
    names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    try:
        wanted = wanted_files(model_id, names, variant)
    except ConfigError:
        return None
    if wanted[0].endswith(SUFFIX):
        return snapshot / wanted[0] if _has_all_parts(wanted) else None
    return snapshot if CONFIG in names and _has_all_shards(snapshot) else None


def snapshot_of(folder: Path, revision: str | None = None) -> Path | None:
    """Of a model's folder in the cache: the snapshot that a revision names; without one that of `main`, else the newest
    with a config.json."""
    named = folder / "refs" / (revision or "main")
    commit = named.read_text().strip() if named.is_file() else revision
    if commit and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    if revision is not None:
        return None
    found = [path for path in (folder / "snapshots").glob("*") if (path / CONFIG).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _has_all_parts(names: Iterable[str]) -> bool:
    names = list(names)
    match = PART.match(names[0])
    return match is None or len(names) == int(match["count"])


def _has_all_shards(snapshot: Path) -> bool:
    """As the index lists them; without one there is one file."""
    try:
        shards = set(json.loads((snapshot / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, AttributeError):
        return False
    return all((snapshot / shard).is_file() for shard in shards)
