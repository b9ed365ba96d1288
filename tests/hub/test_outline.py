"""Outlines: the doctor's sizes of a model on a hub or at a URL, without its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from moe_serve.cli.subject import Subject, subject_of
from moe_serve.doctor.fit import sizes_of
from moe_serve.errors import ConfigError, UnsupportedModelError
from tests.families.gguf_checkpoints import Types, write_pair
from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES
from tests.hub.fake_hub import FakeHub, serving


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASES["qwen3_moe"], tmp_path_factory.mktemp("outline"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def hub_of(stack: ExitStack, files: dict[str, bytes]) -> FakeHub:
    return stack.enter_context(serving(FakeHub(files)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def found(stack: ExitStack, name: str, hub: FakeHub, tmp_path: Path, offline: bool = False) -> Subject:
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path)}
    return stack.enter_context(subject_of(name, None, offline, environment))


@pytest.mark.parametrize("name", ["org/name", "{url}/org/name", "{url}/org/name/tree/main"])
def test_a_model_that_is_not_here_has_the_sizes_of_its_files(
    name: str, checkpoint: Path, stack: ExitStack, tmp_path: Path
) -> None:
    hub = hub_of(stack, files_of(checkpoint))
    subject = found(stack, name.format(url=hub.url), hub, tmp_path)
    assert subject.known == "headers"
    assert subject.download_bytes == (checkpoint / "model.safetensors").stat().st_size
    assert sizes_of(subject.folder, torch.float32) == sizes_of(str(checkpoint), torch.float32)
    assert not (tmp_path / "hub").exists()


def test_only_headers_are_fetched(checkpoint: Path, stack: ExitStack, tmp_path: Path) -> None:
    """The weights of this file are never sent, however long it is."""
    files = files_of(checkpoint)
    large = files["model.safetensors"] + bytes(50_000_000)
    hub = hub_of(stack, {**files, "model.safetensors": large})
    subject = found(stack, "org/name", hub, tmp_path)
    assert subject.download_bytes == len(large)
    assert hub.sent_bytes < 1_000_000
    assert (Path(subject.folder) / "model.safetensors").stat().st_blocks * 512 < 1_000_000


def test_shards_of_a_folder_at_a_url(checkpoint: Path, stack: ExitStack, tmp_path: Path) -> None:
    """A folder without a listing: its index names the shards."""
    files = files_of(checkpoint)
    weights = files.pop("model.safetensors")
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    index = {"weight_map": {name: "a.safetensors" for name in header if name != "__metadata__"}}
    files |= {"a.safetensors": weights, "model.safetensors.index.json": json.dumps(index).encode()}
    hub = hub_of(stack, files)
    subject = found(stack, f"{hub.url}/org/name/resolve/main/config.json", hub, tmp_path)
    assert sizes_of(subject.folder, torch.float32) == sizes_of(str(checkpoint), torch.float32)


@pytest.mark.parametrize("shard", ["../out.safetensors", "/out.safetensors", "a/b.safetensors", "a.bin", 5, None])
def test_an_index_cannot_lead_out_of_the_folder(shard: object, stack: ExitStack, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub = hub_of(stack, {"config.json": b'{"model_type": "mixtral"}', "model.safetensors.index.json": index})
    with pytest.raises(ConfigError, match="is not the name of a safetensors file"):
        found(stack, f"{hub.url}/org/name/resolve/main/config.json", hub, tmp_path)


def test_a_gguf_file_that_is_not_here(checkpoint: Path, stack: ExitStack, tmp_path: Path) -> None:
    file, _ = write_pair(checkpoint, tmp_path / "pair", Types())
    hub = hub_of(stack, {"model-Q8_0.gguf": file.read_bytes()})
    here = stack.enter_context(subject_of(str(file), environment={"XDG_CACHE_HOME": str(tmp_path)}))
    for name in ("org/name:Q8_0", f"{hub.url}/org/name/resolve/main/model-Q8_0.gguf"):
        subject = found(stack, name, hub, tmp_path)
        assert subject.known == "headers"
        assert sizes_of(subject.folder, torch.float32) == sizes_of(here.folder, torch.float32)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"[]", "model.safetensors": bytes(99)}, "expected a JSON object"),
        ({"config.json": b"{", "model.safetensors": bytes(99)}, "not valid JSON"),
        ({"config.json": b'{"model_type": "mixtral"}', "model.safetensors": b"\\xff" * 99}, "not a safetensors file"),
        ({"model.gguf": bytes(99)}, "not a GGUF file"),
        ({"model.gguf": b"GGUF" + bytes(99)}, "metadata cannot be read"),
        ({"README.md": b"x"}, "holds neither"),
    ],
)
def test_what_is_no_checkpoint_is_named(files: dict[str, bytes], words: str, stack: ExitStack, tmp_path: Path) -> None:
    hub = hub_of(stack, files)
    with pytest.raises(ConfigError, match=words):
        found(stack, "org/name", hub, tmp_path)


def test_another_family_ends_before_any_header(stack: ExitStack, tmp_path: Path) -> None:
    hub = hub_of(stack, {"config.json": b'{"model_type": "bert"}', "model.safetensors": bytes(99)})
    with pytest.raises(UnsupportedModelError):
        found(stack, "org/name", hub, tmp_path)
    assert "GET /org/name/resolve/main/model.safetensors" not in hub.requests


def test_a_server_without_ranges_is_named(checkpoint: Path, stack: ExitStack, tmp_path: Path) -> None:
    hub = hub_of(stack, files_of(checkpoint))
    hub.knows_ranges = False
    with pytest.raises(ConfigError, match="range requests"):
        found(stack, "org/name", hub, tmp_path)


def test_offline_asks_nobody(stack: ExitStack, tmp_path: Path) -> None:
    hub = hub_of(stack, {})
    for name in ("org/name", f"{hub.url}/org/name"):
        with pytest.raises(ConfigError, match="--offline"):
            found(stack, name, hub, tmp_path, offline=True)
    assert hub.requests == []
