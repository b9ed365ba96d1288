"""`moe-serve plan` end to end on a small recorded trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.cli import main
from predictors.trace import RoutingTrace

Run = Callable[..., dict[str, Any]]


def routes(seed: int, tokens: int = 400) -> Any:
    """Two hidden groups of experts; a token mostly stays in its group."""
    rng = np.random.default_rng(seed)
    members = np.array([[0, 3, 5, 6], [1, 2, 4, 7]])
    ids = np.zeros((tokens, 4, 2), np.int64)
    for token in range(tokens):
        group = rng.integers(2)
        for layer in range(4):
            group = group if rng.random() < 0.9 else 1 - group
            ids[token, layer] = rng.permutation(members[group])[:2]
    return ids


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.npz"
    RoutingTrace(routes(0), np.arange(0, 401, 20), np.arange(1, 5, dtype=np.int32), 8).save(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object, status: int = 0) -> dict[str, Any]:
        assert main(["plan", *map(str, words)]) == status
        last: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return last

    return call


QUICK = ("--gpus", 2, "--effort", 2, "--time-limit-s", 5, "--quiet")


def test_plan_compare_evaluate_migrate_watch(run: Run, trace: Path, tmp_path: Path) -> None:
    ours, simple = tmp_path / "ours.json", tmp_path / "simple.json"
    result = run(trace, *QUICK, "--held-out", 0.2, "--output", ours, "--curve", "1.2,1.05")
    assert result["best"] == "auto"
    assert result["plans"][2]["cross_device"] < 0.2 < result["plans"][0]["lower_bound"] + 0.3
    assert [point["max_imbalance"] for point in result["curve"]] == [1.2, 1.05]
    assert all(point["balance_worst"] <= point["max_imbalance"] + 1e-6 for point in result["curve"])
    run("solve", trace, *QUICK, "--solver", "round_robin", "--output", simple)
    compared = run("compare", ours, simple, "--trace", trace)["plans"]
    assert compared[0]["traffic"] < compared[1]["traffic"]
    assert run("evaluate", ours, trace)["here"]["cross_device"] < 0.2
    steps = tmp_path / "steps.jsonl"
    moves = run("migrate", simple, ours, "--steps", steps)
    assert moves["steps"] == len(steps.read_text().splitlines()) > 0
    verdict = run("watch", simple, trace, "--window", 300, "--horizon", 10**9, "--time-limit", 2)
    assert verdict["migrate"] is True


def test_every_export_is_written(run: Run, trace: Path, tmp_path: Path) -> None:
    files = {flag: tmp_path / name for flag, name in (
        ("--html", "p.html"), ("--png", "p.png"), ("--sglang", "s.json"), ("--eplb", "e.npz"),
    )}  # fmt: skip
    run(trace, *QUICK, *(word for pair in files.items() for word in pair), "--model-layers", 6)
    assert np.shape(json.loads(files["--sglang"].read_text())["physical_to_logical_map"]) == (6, 8)
    with np.load(files["--eplb"]) as maps:
        assert maps["physical_to_logical_map"].shape == (4, 8)
    assert all(path.stat().st_size for path in files.values())


def test_other_systems_recordings_are_read(run: Run, tmp_path: Path) -> None:
    import torch

    vllm, eplb, dump, stat = (tmp_path / name for name in ("v.npy", "w.npy", "per_token.pt", "stat.pt"))
    ids = routes(1, 50).astype(np.int16)
    np.save(vllm, ids)
    np.save(eplb, np.random.default_rng(0).gamma(1, size=(4, 8)))
    record = {"forward_pass_id": 0, "positions": list(range(50)), "extend_seq_lens": [50], "rank": 0}
    torch.save({"records": [{**record, "topk_ids_of_layer": torch.tensor(ids.transpose(1, 0, 2))}]}, dump)
    torch.save({"rank": 0, "logical_count": torch.ones(3, 4, 8)}, stat)
    for path in (vllm, dump):
        assert run(path, *QUICK, "--num-experts", 8)["plans"][2]["traffic"] < 0.4
    for path in (eplb, stat):
        assert run(path, *QUICK, "--balance-price", 1)["plans"][2]["traffic"] == 0


WRONG = {
    "no file": (["missing.npz"], "missing.npz"),
    "unknown format": (["trace.csv"], "trace.csv: unknown format"),
    "not a torch file": (["broken.pt"], "broken.pt: cannot be read as a torch file"),
    "truncated trace": (["broken.npz"], "broken.npz"),
    "bad pin": (["trace.npz", "--pin", "1:2"], "--pin takes LAYER:EXPERT:GPU"),
    "pin outside": (["trace.npz", "--pin", "9:0:0"], "--pin 9:0:0: the trace has 4 layers"),
    "all held out": (["trace.npz", "--held-out", "1"], "--held-out 1.0 leaves nothing"),
    "odd nodes": (["trace.npz", "--gpus", "4", "--gpus-per-node", "3"], "gpus_per_node: must divide"),
    "little memory": (["trace.npz", "--gpus", "2", "--memory-mib", "4"], "memory_bytes: 2 experts of a layer fit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(trace.parent)
    for name in ("broken.pt", "broken.npz"):
        Path(name).write_bytes(trace.read_bytes()[:60])
    words, message = WRONG[case]
    assert main(["plan", *words, "--quiet", "--time-limit", "2"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_limit_nobody_can_keep_is_status_1(run: Run, tmp_path: Path) -> None:
    weight = np.ones((1, 4))
    weight[0, 0] = 97
    np.save(tmp_path / "hot.npy", weight)
    assert run(tmp_path / "hot.npy", *QUICK, "--max-imbalance", 1.1, status=1)["plans"][0]["violation"] > 0


def test_more_gpus_than_experts(run: Run, trace: Path, tmp_path: Path) -> None:
    """12 GPUs on 4 nodes for 8 experts: at least 4 hold nothing, in every file the command writes."""
    files = {
        flag: tmp_path / name for flag, name in (("--output", "p.json"), ("--eplb", "e.npz"), ("--html", "p.html"))
    }
    words = ["--gpus", 12, "--gpus-per-node", 3, "--effort", 2, "--time-limit", 5, "--quiet"]
    result = run(trace, *words, *(word for pair in files.items() for word in pair))
    assert result["best"] == "auto"
    plan = json.loads(files["--output"].read_text())
    assert len({device for row in plan["device_of"] for device in row}) <= 12
    with np.load(files["--eplb"]) as maps:
        assert maps["physical_to_logical_map"].shape == (4, 12)
    assert run("compare", files["--output"], files["--output"], "--trace", trace)["plans"]
