"""The first wrong step: one line with the right next step, before anything heavy is imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_serve.cli.flags import default_model
from moe_serve.config.model_folder import model_id_of
from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.hub.find import find_model

HEAVY = {"torch", "transformers", "tokenizers", "fastapi", "uvicorn"}
CPU_S = 1.0
"""Most CPU time until the answer; typical: 0.2. CPU time, since the machine may be busy."""
PROBE = """
import json, sys, time
from moe_serve.cli import main
try:
    status = main({argv!r})
except SystemExit as stop:
    status = stop.code
print(json.dumps([status, sorted(sys.modules), time.process_time()]))
"""


def _answer(*argv: str, **environment: str) -> str:
    """The one line that `moe-serve` says to a mistake."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(argv=list(argv))],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )
    status, modules, cpu_s = json.loads(done.stdout)
    assert status == 2
    assert not HEAVY & set(modules)
    assert cpu_s < CPU_S
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("serve /nowhere", "/nowhere: no such folder; give the path of a Hugging Face checkpoint folder"),
        ("serve org/name --offline", "does not hold all of such a model"),
        ("doctor /nowhere", "no such folder"),
        ("quantize /nowhere -o out", "no such folder"),
        ("generate a --prompt b", "a: no such folder"),
        ("generate MODEL text", "unexpected argument: text; give the text with --prompt"),
        ("serve --model X", "MODEL is given without a flag"),
        ("serve --gpu-memory-utilization 0.9", "--moe-cache-mib limits the memory for experts"),
        ("serve --tensor-parallel-size 2", "--devices N divides the experts"),
        ("generate --config x.yaml", "only `moe-serve serve` reads a file"),
        ("serve -ngl 99", "--moe-cache-mib limits the experts there"),
        ("serve --moe-expert-file /nowhere", "--moe-expert-file: there is no file /nowhere"),
        ("serve --api-key-file /nowhere", "--api-key-file: there is no file /nowhere"),
        ("serve --devices 2 --expert-plan /nowhere", "--expert-plan: there is no file /nowhere"),
        ("serve --moe-cache-mib 0 --moe-prefetch affinity", "--moe-prefetch has no effect with --moe-cache-mib 0"),
        ("serve --ep-mode coherent", "--ep-mode has no effect on one device"),
        ("chat --url http://127.0.0.1:9 --max-model-len 8", "--max-model-len has no effect with --url"),
        ("serve --port 99999", "--port must be at most 65535, got 99999"),
        ("serve --devices 2 --rank-port 99999", "--rank-port must be at most 65535, got 99999"),
        ("generate --prompt x --num-threads 1000000", "--num-threads must be at most 1024, got 1000000"),
        ("generate --prompt x --num-kv-pages 99999999999999", "--num-kv-pages must be at most 2147483647"),
        ("generate --max-queue-wait-s 3 --prompt x", "unknown flag --max-queue-wait-s"),
    ],
)
def test_a_mistake_is_answered_at_once(argv: str, words: str) -> None:
    assert words in _answer(*argv.split())


def test_a_port_in_use(taken_port: int) -> None:
    assert f"cannot listen on 127.0.0.1 port {taken_port}" in _answer("serve", "--port", str(taken_port))


def test_a_budget_below_one_expert(tmp_path: Path) -> None:
    """A header that promises experts of 8 MiB; their bytes are never read."""
    shutil.copy(Path(default_model()) / "config.json", tmp_path)
    part = {"dtype": "BF16", "shape": [1 << 11, 1 << 11], "data_offsets": [0, 1 << 23]}
    header = json.dumps({"model.layers.0.block_sparse_moe.experts.0.w1.weight": part}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 23))
    line = _answer("serve", str(tmp_path), "--moe-cache-mib", "3")
    assert "--moe-cache-mib 3 does not hold a single expert; give at least 4" in line


def test_another_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert re.search("model_type 'bert' is not .* supported: .*mixtral", _answer("serve", str(tmp_path)))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert f"{tmp_path}/config.json" in _answer("serve", str(tmp_path))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("consolidated.00.pth", "Mistral's own format"),
        ("pytorch_model.bin", "save_pretrained"),
        ("notes.txt", "config.json is missing"),
        ("empty.gguf", "empty.gguf: cut off, or not a GGUF file"),
    ],
)
def test_what_people_have_instead(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=words):
        find_model(str(tmp_path))


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"model.bin is a file; .* or a .gguf file"):
        find_model(str(tmp_path / "model.bin"))


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A model's folder in a Hugging Face cache, of two snapshots, the older one being main."""
    folder = tmp_path / "hub" / "models--org--name"
    for number, name in enumerate(("old", "new")):
        (folder / "snapshots" / name).mkdir(parents=True)
        (folder / "snapshots" / name / "config.json").touch()
        (folder / "snapshots" / name / "model.safetensors").touch()
        os.utime(folder / "snapshots" / name, (number, number))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("old")
    return folder


def test_a_model_id_is_found_in_the_cache(cached: Path) -> None:
    old = str(cached / "snapshots" / "old")
    assert find_model("org/name", environment={"HF_HUB_CACHE": str(cached.parent)}) == old
    assert find_model("org/name", environment={"HF_HOME": str(cached.parents[1])}) == old
    assert find_model(str(cached)) == old
    assert find_model(str(cached / "snapshots")) == old
    assert model_id_of(old) == "org/name"
    (cached / "refs" / "main").unlink()
    assert find_model("org/name", environment={"HF_HUB_CACHE": str(cached.parent)}) == str(cached / "snapshots" / "new")


def test_a_folder_wins_over_the_cache(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name", environment={"HF_HUB_CACHE": str(cached.parent)}) == "org/name"
    assert model_id_of("org/name") is None


def test_mlx_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    note = {"group_size": 64, "bits": 4}
    fields = {"model_type": "mixtral", "quantization": note, "quantization_config": note}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert f"{tmp_path}/config.json: quantization is MLX's note (mlx-community)" in _answer("serve", str(tmp_path))
