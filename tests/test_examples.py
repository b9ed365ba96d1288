"""examples/ and the snippets of docs/libraries.md run, on the demo model and its own routes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.support.scripts import script

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LIBRARIES = (ROOT / "docs" / "libraries.md").read_text()
SNIPPETS = {
    name: "\n".join(line[4:] for line in code.splitlines())
    for name, code in re.findall(r"^## (\w+)\n.*?((?:^    [^\n]*\n|^\n(?=    ))+)", LIBRARIES, flags=re.M | re.S)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a trace of 8 sequences through 4 layers of 8 experts, in which experts follow one another."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, (320, 1))
    ids = np.stack([(first + layer + np.array([[0, 3]])) % 8 for layer in range(4)], axis=1)
    noisy = rng.random((320, 4, 1)) < 0.1
    ids = np.where(noisy, (ids + 1) % 8, ids).astype(np.uint8)
    offsets, layers = np.arange(0, 321, 40), np.arange(4, dtype=np.int32)
    np.savez(
        folder / "trace.npz", ids=ids, seq_offsets=offsets, layer_ids=layers, n_experts=np.int64(8), top_k=np.int64(2)
    )
    return folder


def run(folder: Path, *command: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run_by_a_test() -> None:
    """openai_client by tests/server/test_openai_client.py's server shape; the plugin by tests/test_extensions.py."""
    tests = Path(__file__).read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"openai_client"}
    assert {name for name in names if f'"{name}' not in tests} == set()
    assert set(SNIPPETS) == {"expert_cache", "predictors", "placement", "moe_serve_kernels"}


def test_learnt_predictors_beat_chance(folder: Path) -> None:
    rows = [line.split() for line in run(folder, str(EXAMPLES / "predictor.py"), "trace.npz").splitlines()]
    recall = {row[0]: float(row[5].rstrip(",")) for row in rows}
    assert recall["transition"] > 0.8 > 0.5 > recall["random"]


def test_a_planner_saves_hops(folder: Path) -> None:
    out = run(folder, str(EXAMPLES / "planner.py"), "trace.npz", "2")
    hops = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()[:2]}
    assert hops["auto"] < hops["contiguous"]
    assert (folder / "plan.json").exists()


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_runs(name: str, folder: Path) -> None:
    assert run(folder, "-c", SNIPPETS[name]).strip() or name == "moe_serve_kernels"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offline", "async_embedding"])
def test_prompts_are_completed(name: str, tmp_path: Path) -> None:
    assert "The old captain looked at the sea and said," in run(tmp_path, str(EXAMPLES / f"{name}.py"))


@pytest.mark.slow
def test_offload_changes_no_token(tmp_path: Path) -> None:
    out = run(tmp_path, str(EXAMPLES / "offload.py"))
    assert out.splitlines()[-1] == "the same tokens"


@pytest.mark.slow
def test_a_batch_keeps_its_order_and_its_bad_lines(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "Hello!"}, {"id": "b", "question": "word " * 400}, {"id": "c", "question": "Hi"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, str(EXAMPLES / "batch.py"), "in.jsonl", "out.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", "b", "c"]
    assert answers[0]["answer"]
    assert "context" in answers[1]["error"]


@pytest.mark.slow
def test_a_model_answers_inside_another_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fastapi_app.py"])
    with TestClient(script(EXAMPLES / "fastapi_app.py").app) as client:
        text = client.post("/answer", json={"text": "Hello!"}).json()["text"]
        streamed = client.post("/stream", json={"text": "Once upon a time"}).text
    assert text
    assert streamed
