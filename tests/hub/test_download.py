"""Model ids: found in the cache, downloaded from a hub, and every way in which that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_serve.config.model_folder import model_id_of
from moe_serve.errors import ConfigError, UnsupportedModelError
from moe_serve.hub.find import find_model
from moe_serve.hub.wanted import wanted_files
from tests.hub.fake_hub import COMMIT, FakeHub, serving

CONFIG = b'{"model_type": "mixtral"}'
FILES = {
    "config.json": CONFIG,
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode(),
    "model-1.safetensors": bytes(5000),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "README.md": b"x",
    "pytorch_model.bin": bytes(9000),
    "consolidated.safetensors": bytes(9000),
    "original/model.safetensors": bytes(9000),
}
WANTED = set(FILES) - {"README.md", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"}
Start = Callable[[FakeHub], dict[str, str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a hub; the environment in which it is the one to ask."""
    with ExitStack() as stack:

        def run(hub: FakeHub) -> dict[str, str]:
            stack.enter_context(serving(hub))
            return {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path)}

        yield run


def test_what_is_needed_is_downloaded_once(start: Start) -> None:
    hub = FakeHub(FILES)
    environment = start(hub)
    folder = find_model("org/name", environment={**environment, "HF_TOKEN": "hf_secret"})
    assert hub.downloaded == WANTED
    assert hub.tokens == {"Bearer hf_secret"}
    assert {path.name for path in Path(folder).iterdir()} == WANTED
    assert (Path(folder) / "model-1.safetensors").read_bytes() == FILES["model-1.safetensors"]
    assert model_id_of(folder) == "org/name"
    hub.requests.clear()
    assert find_model("org/name", environment=environment) == folder
    assert find_model("org/name", offline=True, environment=environment) == folder
    assert hub.requests == []


def test_a_download_that_was_cut_off_goes_on(start: Start) -> None:
    hub = FakeHub(FILES)
    environment = start(hub)
    folder = Path(find_model("org/name", environment=environment))
    (folder / "model-1.safetensors").unlink()
    hub.requests.clear()
    with pytest.raises(ConfigError, match="does not hold all of such a model"):
        find_model("org/name", offline=True, environment=environment)
    assert find_model("org/name", environment=environment) == str(folder)
    assert (folder / "model-1.safetensors").is_file()
    assert "config.json" not in hub.downloaded


def test_a_revision(start: Start) -> None:
    environment = start(FakeHub(FILES))
    folder = find_model("org/name", "v1", environment=environment)
    assert Path(folder).name == COMMIT
    assert (
        find_model("org/name", "v1", True, environment) == find_model("org/name", COMMIT, True, environment) == folder
    )
    with pytest.raises(ConfigError, match=r"--revision: org/name has no revision 'v2'"):
        find_model("org/name", "v2", environment=environment)


class Usage(NamedTuple):
    """As shutil.disk_usage has it, in bytes."""

    total: int
    used: int
    free: int


class Case(NamedTuple):
    """What a hub answers, and the words of our error."""

    hub: FakeHub
    words: str
    name: str = "org/name"


CASES = {
    "gated": Case(
        FakeHub(FILES, error="GatedRepo"), r"org/name is gated: accept its terms at http.*, and set HF_TOKEN"
    ),
    "unknown": Case(FakeHub(FILES), r"org/other: no such folder, and no such model at http", "org/other"),
    "no weights": Case(FakeHub({"config.json": CONFIG}), r"neither \*.safetensors nor \*.gguf"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_says_what_to_do(case: str, start: Start) -> None:
    hub, words, name = CASES[case]
    with pytest.raises(ConfigError, match=words):
        find_model(name, environment=start(hub))


def test_another_family_is_refused_before_its_weights_come(start: Start) -> None:
    hub = FakeHub({**FILES, "config.json": b'{"model_type": "bert"}'})
    with pytest.raises(UnsupportedModelError, match="model_type 'bert' is not"):
        find_model("org/name", environment=start(hub))
    assert hub.downloaded == {"config.json"}


def test_a_disk_that_is_too_small(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = start(FakeHub(FILES))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10000, 9900, 100))
    with pytest.raises(ConfigError, match=r"org/name takes 0.0 GB, but only 0.0 GB are free in .*; HF_HUB_CACHE"):
        find_model("org/name", environment=environment)


def test_no_network(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"org/name: no such folder, and it cannot be downloaded from http"):
        find_model("org/name", environment=environment)
    with pytest.raises(ConfigError, match=r"without --offline \(or HF_HUB_OFFLINE\) it is downloaded"):
        find_model("org/name", environment={**environment, "HF_HUB_OFFLINE": "1"})


def test_which_of_several_gguf_files() -> None:
    names = ["config.json", "m-UD-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-F16.gguf"]
    names += [f"Q4_K_M/m-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert wanted_files("o/m", names, "q8_0") == ["m-Q8_0.gguf"]
    assert wanted_files("o/m", names, "Q4_K_M") == names[4:]
    with pytest.raises(ConfigError, match=r"o/m holds 3 GGUF models; name one, such as o/m:Q4_K_M, of: m-Q4_K_M, m-Q8"):
        wanted_files("o/m", names, None)
    with pytest.raises(ConfigError, match=r"o/m:Q2_K fits 0 GGUF models"):
        wanted_files("o/m", names, "Q2_K")
