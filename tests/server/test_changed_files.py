"""A checkpoint file that changes under the server: requests end by the file's name, the process lives."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from moe_serve.demo import MODEL
from moe_serve.engine.mapped_files import PERIOD_S_PER_FILE, MappedFiles
from moe_serve.errors import CheckpointChangedError
from tests.patience import PATIENCE_S
from tests.server.serve_process import Reader, Serve, child_of, complete, serving


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    with serving(tmp_path) as make:
        yield make


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The weights in a copy of the demo model."""
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model" / "model.safetensors"


@pytest.mark.slow
def test_truncated_between_requests(start: Callable[..., Serve], file: Path) -> None:
    server = start(str(file.parent))
    server.wait_until(lambda: server.health() == "ready")
    child = child_of(server)
    assert complete(server).status_code == 200
    file.touch()
    assert complete(server).status_code == 200
    os.truncate(file, 1_000_000)
    for _ in range(2):
        refused = complete(server)
        assert refused.status_code == 503
        assert str(file) in refused.json()["error"]["message"]
    health = httpx.get(f"{server.url}/health", timeout=PATIENCE_S)
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    assert str(file) in health.json()["error"]
    assert httpx.get(f"{server.url}/live", timeout=PATIENCE_S).status_code == 503
    assert child_of(server) == child
    assert len([line for line in server.log.splitlines() if "changed while it was in use" in line]) == 1


def flip_byte(path: Path) -> None:
    """Of the last tensor."""
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.slow
def test_changed_while_a_request_runs(start: Callable[..., Serve], file: Path) -> None:
    server = start(str(file.parent))
    server.wait_until(lambda: server.health() == "ready")
    reader = Reader(server.url)
    server.wait_until(lambda: len(reader.events) > 3)
    flip_byte(file)  # a truncation could be met in the middle of a step
    reader.join()
    assert str(file) in json.loads(reader.events[-2])["error"]["message"]


@pytest.mark.slow
def test_replaced_by_a_rename_does_no_harm(start: Callable[..., Serve], file: Path) -> None:
    server = start(str(file.parent))
    server.wait_until(lambda: server.health() == "ready")
    before = complete(server).json()["choices"]
    other = file.with_name("other")
    other.write_bytes(b"x" * 1000)
    other.rename(file)
    assert complete(server).json()["choices"] == before


def test_a_file_that_grew_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x" * 5000)
    files = MappedFiles(paths)
    files.check()
    with paths[1].open("ab") as more:
        more.write(b"y")
    time.sleep(PERIOD_S_PER_FILE * len(paths))
    with pytest.raises(CheckpointChangedError, match=str(paths[1])):
        files.check()
    files.close()


RANKS = ("--devices", "2", "--num-kv-pages", "64", "--max-model-len", "128")


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 1_000_000), flip_byte], ids=["truncated", "written"])
def test_ranks_notice_too(start: Callable[..., Serve], file: Path, change: Callable[[Path], object]) -> None:
    """Another group of ranks would compute with another model, or could not load it: none is started."""
    server = start(str(file.parent), *RANKS)
    server.wait_until(lambda: server.health() == "ready")
    file.touch()
    assert complete(server).status_code == 200
    change(file)
    for _ in range(2):
        refused = complete(server)
        assert refused.status_code == 503
        assert f"{file}: the file was changed while it was in use" in refused.json()["error"]["message"]
    health = httpx.get(f"{server.url}/health", timeout=PATIENCE_S)
    assert (health.status_code, health.json()["status"]) == (503, "dead")
    assert str(file) in health.json()["error"]
    assert httpx.get(f"{server.url}/live", timeout=PATIENCE_S).status_code == 503
    assert "all ranks start again" not in server.log
    assert "Traceback" not in server.log
