"""A checkpoint's outline: its config, its index and the headers of its weight files, fetched without a weight.

A few MB tell the names, types and shapes of hundreds of GB. The outline's weight files are sparse: as long as the real
ones, with zeros behind the header. So whatever reads sizes takes the folder for the checkpoint itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe_serve.config.model_folder import CONFIG
from moe_serve.errors import ConfigError, one_line
from moe_serve.gguf_files.paths import SUFFIX
from moe_serve.hub.cache import INDEX
from moe_serve.hub.download import CheckConfig, Repository
from moe_serve.hub.remote_files import RemoteFiles
from moe_serve_base.safetensors_header import LENGTH_BYTES

ON_A_HUB = re.compile(r"/(?P<id>[\w.-]+/[\w.-]+)(/(tree|blob|resolve)/(?P<revision>[^/]+)(/(?P<file>.+\.gguf))?)?/?")
"""The path of a model's page, or of a file in it."""
QUANTIZATION = "hf_quant_config.json"
ONE_FILE = "model.safetensors"
SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
"""A file beside the index: no name leads out of the folder."""
FIRST_BYTES = 1 << 18
"""Of a weight file: most headers end within them."""
MOST_HEADER_BYTES = 1 << 28
READERS = 8


def outline_of_id(
    model_id: str,
    revision: str | None,
    variant: str | None,
    environment: Mapping[str, str],
    check: CheckConfig,
    into: Path,
) -> Path:
    """The outline of a hub's model in the folder `into`: the folder, or the first GGUF file in it. ConfigError.

    Arguments but `into` as in `Repository.download`.
    """
    repository = Repository(model_id, revision, environment)
    names = repository.names(variant)
    with RemoteFiles(repository.files_url, repository.headers) as files:
        if names[0].endswith(SUFFIX):
            return _gguf(files, names, into)
        _small_files(files, [name for name in (CONFIG, INDEX, QUANTIZATION) if name in names], check, into)
        _weights(files, [name for name in names if name.endswith(".safetensors")], into)
    return into


def outline_of_url(
    url: str, revision: str | None, environment: Mapping[str, str], check: CheckConfig, into: Path
) -> Path:
    """The outline of what a URL names: a model's page on a hub, a folder with a config.json, or a GGUF file."""
    parts = urlsplit(url)
    match = ON_A_HUB.fullmatch(parts.path)
    if match is not None and match["file"] is None and not url.endswith((SUFFIX, ".json")):
        hub = {**environment, "HF_ENDPOINT": f"{parts.scheme}://{parts.netloc}"}
        return outline_of_id(match["id"], match["revision"] or revision, None, hub, check, into)
    base, _, name = url.partition("?")[0].rpartition("/")
    if name.endswith(SUFFIX):
        with RemoteFiles(base.replace("/blob/", "/resolve/"), {}) as files:
            return _gguf(files, [name], into)
    base = base if name.endswith(".json") else f"{base}/{name}".rstrip("/")
    with RemoteFiles(base.replace("/blob/", "/resolve/"), {}) as files:
        _small_files(files, [CONFIG], check, into)
        _small_files(files, [name for name in (INDEX, QUANTIZATION) if files.has(name)], check, into)
        _weights(files, _shards(into), into)
    return into


def _shards(folder: Path) -> list[str]:
    """The files that the fetched index lists; without one there is one file."""
    path = folder / INDEX
    if not path.is_file():
        return [ONE_FILE]
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{INDEX}: not an index of shards") from error
    for name in names:
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ConfigError(f"{INDEX}: {name!r} is not the name of a safetensors file in the same folder")
    return sorted(names)


def _small_files(files: RemoteFiles, names: Sequence[str], check: CheckConfig, into: Path) -> None:
    for name in names:
        data = files.whole(name)
        (into / name).write_bytes(data)
        if name == CONFIG:
            check(_object(data, files.url))


def _object(data: bytes, url: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{url}/{CONFIG}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{url}/{CONFIG}: expected a JSON object")
    return fields


def _weights(files: RemoteFiles, names: Sequence[str], into: Path) -> None:
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda name: _safetensors(files, name, into), names):
            pass


def _safetensors(files: RemoteFiles, name: str, into: Path) -> None:
    """A sparse file with the header of a remote one."""
    data, size = files.start(name, FIRST_BYTES)
    end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    if end > min(size, MOST_HEADER_BYTES):
        raise ConfigError(f"{files.url}/{name}: not a safetensors file")
    if end > len(data):
        data, size = files.start(name, end)
    _write_sparse(into / name, data[:end], size)


def _gguf(files: RemoteFiles, names: Sequence[str], into: Path) -> Path:
    """Sparse files with the metadata and the tables of tensors of remote ones; the first of them."""
    from moe_serve.gguf_files.reading import MAGIC, header_end  # imports the gguf package, which help must not wait for

    for name in names:
        count, end = FIRST_BYTES, None
        while end is None:
            count *= 8
            data, size = files.start(name, min(count, MOST_HEADER_BYTES))
            if not data.startswith(MAGIC):
                raise ConfigError(f"{files.url}/{name}: not a GGUF file")
            path = into / name.split("/")[-1]
            _write_sparse(path, data, size)
            end = header_end(path, len(data))
            if end is None and len(data) >= min(size, MOST_HEADER_BYTES):
                raise ConfigError(f"{files.url}/{name}: its metadata cannot be read")
    return into / names[0].split("/")[-1]


def _write_sparse(path: Path, start: bytes, size: int) -> None:
    try:
        with path.open("wb") as stream:
            stream.write(start)
            stream.truncate(size)
    except OSError as error:
        raise ConfigError(f"{path.name}: an outline of {size} bytes cannot be made: {one_line(error)}") from error
