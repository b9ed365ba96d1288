"""`moe-serve predictor`: the tables, the files, and what it says to a mistake."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_serve.cli import main
from moe_serve.parallel.front.token_uses import load_uses
from predictors.files import load
from predictors.trace import RoutingTrace, offsets_of
from predictors.trace import load as load_trace

L, E, K = 4, 8, 2
QUICK = ["--method", "frequency", "transition", "oracle"]


def write_trace(path: Path, seed: int) -> str:
    """Layer l+1 mostly repeats layer l."""
    rng = np.random.default_rng(seed)
    liked = rng.normal(size=(200, 1, E)) * 3
    ids = np.argsort(-(liked + rng.normal(size=(200, L, E))), axis=2)[:, :, :K]
    RoutingTrace(ids, offsets_of([20] * 10), np.arange(L, dtype=np.int32), E, meta={"fingerprint": "f" * 64}).save(path)
    return str(path)


@pytest.fixture
def traces(tmp_path: Path) -> list[str]:
    return [write_trace(tmp_path / f"{name}.npz", seed) for seed, name in enumerate("ab")]


def rows_of(text: str) -> dict[str, list[float]]:
    found = re.findall(r"^  (\w+)((?: +-?[\d.]+)+)", text, re.MULTILINE)
    return {name: [float(word) for word in numbers.split()] for name, numbers in found}


@pytest.mark.parametrize("held_out", ["sequence", "task"])
def test_tables_and_files(traces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: str) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    argv = ["predictor", "evaluate", *traces, *QUICK, "--held-out", held_out, "--capacity", "50", "--expert-mib", "2"]
    assert main([*argv, *files]) == 0
    recall, replay = (rows_of(table) for table in capsys.readouterr().out.split("\n\n"))
    assert list(recall) == ["frequency", "transition", "oracle"]
    assert recall["oracle"] == [100] * 3  # d = 1, 2, before: 4 and 8 are farther than 4 layers reach
    assert recall["frequency"][0] < recall["transition"][0] < 100
    assert set(replay) == {"frequency", "transition", "oracle", "lru", "lfru", "affinity", "belady"}
    assert replay["lfru"][2] == 0
    assert replay["belady"][0] == max(hits for hits, *_ in replay.values())
    for hits, misses, _, mib in replay.values():
        assert misses == pytest.approx(L * K * (1 - hits / 100), abs=0.01)
        assert mib == pytest.approx(2 * misses, abs=0.05)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["methods"]["transition"]["1"]["recall_by_layer"][0] is None
    assert len(report["replay"]) == 7
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_train_writes_what_load_reads(traces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.safetensors"
    assert main(["predictor", "train", *traces, "--method", "transition", "--output", str(out)]) == 0
    assert "transition from 400 tokens" in capsys.readouterr().out
    file = load(out)
    assert (file.method, file.fingerprint) == ("transition", "f" * 64)


def test_traces_of_two_checkpoints_are_refused(
    traces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(load_trace(traces[1]), meta={"fingerprint": "e" * 64}).save(traces[1])
    assert main(["predictor", "train", *traces, "--output", str(tmp_path / "p")]) == 2
    assert "different checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--capacity", "0"], "--capacity 0"),
        (["--capacity", "101"], "--capacity 101"),
        (["--lookahead", "0"], "give 1 or more"),
        (["--held-out", "task"], "--held-out task needs two traces"),
        (["--json", "/nowhere/r.json"], "its folder does not exist"),
        (["--method", "next_gate"], "next_gate needs"),
    ],
)
def test_mistakes(traces: list[str], capsys: pytest.CaptureFixture[str], argv: list[str], complaint: str) -> None:
    assert main(["predictor", "evaluate", traces[0], *argv]) == 2
    assert complaint in capsys.readouterr().err


def test_next_gate_is_not_trained(traces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predictor", "train", *traces, "--method", "next_gate", "--output", str(tmp_path / "p")]) == 2
    assert "next_gate needs every layer's router" in capsys.readouterr().err


def test_tokens_counts_what_each_token_id_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 3]], [[1, 2], [0, 3]]])
    trace, out = tmp_path / "trace.npz", tmp_path / "uses.npz"
    RoutingTrace(ids, np.array([0, 3]), np.array([1, 2]), 4, token_ids=np.array([5, 9, 5])).save(trace)
    assert main(["predictor", "tokens", str(trace), "--output", str(out)]) == 0
    assert "2 token ids, 2 layers of 4 experts" in capsys.readouterr().out
    uses = load_uses(str(out))
    assert uses.token_ids.tolist() == [5, 9]
    assert uses.counts.tolist() == [[[1, 2, 1, 0], [1, 0, 1, 2]], [[1, 0, 1, 0], [0, 0, 1, 1]]]
    assert uses.layer_ids.tolist() == [1, 2]


def test_tokens_needs_token_ids(traces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predictor", "tokens", *traces, "--output", str(tmp_path / "uses.npz")]) == 2
    assert "token_ids: missing; record it with `moe-serve trace`" in capsys.readouterr().err
