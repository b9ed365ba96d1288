"""`moe-serve replay`: the table, the files it writes, and what it says to a mistake."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_cache.policies import policy_names
from moe_serve.cli import main
from predictors.trace import RoutingTrace, load

L, E, K, N = 2, 8, 2, 60


def write_trace(path: Path, seed: int = 0, num_experts: int = E) -> Path:
    rng = np.random.default_rng(seed)
    popularity = rng.random((L, num_experts))
    ids = np.argsort(rng.random((N, L, num_experts)) * popularity, axis=2)[:, :, -K:]
    RoutingTrace(ids, np.array([0, 20, N]), np.arange(L, dtype=np.int32), num_experts).save(path)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(write_trace(tmp_path / "a.npz"))


@pytest.fixture
def profile(tmp_path: Path) -> str:
    return str(write_trace(tmp_path / "b.npz", seed=1))


def rows_of(table: str) -> dict[str, list[float]]:
    """Numbers of each policy's line, for one table."""
    found = re.findall(r"^  (\w+)((?: +-?[\d.]+| +-)+)$", table, re.MULTILINE)
    return {name: [math.nan if word == "-" else float(word) for word in numbers.split()] for name, numbers in found}


def test_a_table_for_each_capacity(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", trace, "--capacity", "25", "50"]) == 0
    tables = capsys.readouterr().out.split("\n\n")[:2]
    assert [table.split(" ", 1)[0] for table in tables] == ["25", "50"]
    assert "4 slots, per-layer, 2 of 8 a layer; 60 tokens, 1 at a time; union/slots 1.00" in tables[0]
    for table in tables:
        rows = rows_of(table)
        assert set(rows) == {*policy_names(), "belady"} - {"static", "predicted"}
        assert rows["lru"][1] == 0
        assert rows["belady"][:2] == [max(row[0] for row in rows.values()), 100]
        for hits_percent, _, misses_per_token in rows.values():
            assert misses_per_token == pytest.approx((1 - hits_percent / 100) * L * K, abs=0.01)


def test_a_profile_makes_static_and_quotas_possible(
    trace: str, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["replay", trace, "--profile", profile, "--capacity", "50", "--pool"]
    hits = {}
    for pool in ("per-layer", "global", "quota"):
        assert main([*argv, pool]) == 0
        out = capsys.readouterr().out
        assert f"8 slots, {pool}, " in out
        hits[pool] = rows_of(out)["static"][0]
    assert hits["global"] != hits["per-layer"]


def test_bypass_says_so(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    hits = []
    for flags in ([], ["--bypass"]):
        assert main(["replay", trace, "--capacity", "25", "--policies", "lfu", *flags]) == 0
        out = capsys.readouterr().out
        assert ("per-layer, bypass" in out) == bool(flags)
        hits.append(rows_of(out)["lfu"][0])
    assert hits[1] > hits[0]


def test_json_holds_every_figure(trace: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    argv = [
        "--capacity",
        "25",
        "50",
        "--policies",
        "lfu",
        "--expert-mib",
        "2",
        "--concurrency",
        "2",
        "--limit-tokens",
        "50",
    ]
    assert main(["replay", trace, *argv, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert (report["tokens"], report["concurrency"], report["layer_ids"]) == (50, 2, [0, 1])
    rows = report["rows"]
    assert [(r["policy"], r["capacity_percent"]) for r in rows] == [(p, c) for c in (25, 50) for p in ("lfu", "belady")]
    for row in rows:
        hits, misses = sum(row["hits_by_layer"]), sum(row["misses_by_layer"])
        assert row["hit_frac"] == pytest.approx(hits / (hits + misses))
        assert row["misses_per_token"] == misses / 50
        assert row["bytes_per_token"] == misses / 50 * 2 * 2**20


def test_recordings_of_other_systems(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One request, as SGLang and vLLM would write it, replays like our own file of it."""
    ids = load(trace).ids.astype(np.int32)
    np.save(tmp_path / "rows.npy", ids)
    record = {
        "forward_pass_id": 1,
        "positions": list(range(N)),
        "extend_seq_lens": [N],
        "topk_ids_of_layer": torch.from_numpy(ids.transpose(1, 0, 2).copy()),
    }
    torch.save({"records": [record], "last_physical_to_logical_map": torch.arange(E)}, tmp_path / "dump.pt")
    outputs = []
    for path in (trace, f"{tmp_path}/rows.npy", f"{tmp_path}/dump.pt"):
        assert main(["replay", path, "--num-experts", str(E), "--policies", "lru"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]


def test_where_lru_is_the_bound_there_is_no_gap(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert main(["replay", trace, "--capacity", "100", "--policies", "lfu", "--json", str(out)]) == 0
    assert math.isnan(rows_of(capsys.readouterr().out)["lfu"][1])
    assert json.loads(out.read_text())["rows"][0]["gap_closed_frac"] is None


def test_plot_is_a_png(trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "r.png"
    assert main(["replay", trace, "--policies", "lru", "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_missing_matplotlib_is_said_before_the_replay(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["replay", trace, "--plot", str(tmp_path / "r.png")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "moe-serve: error: --plot needs matplotlib: pip install 'moe-serve-engine[plot]'\n"
    assert captured.out == ""


MISTAKES = {
    "no such trace": (["{dir}/none.npz"], "none.npz: file: does not exist"),
    "a trace that is none": (["{dir}/text.npz"], "text.npz: is no whole .npz file"),
    "a recording that does not say its experts": (["{dir}/rows.npy"], "rows.npy: does not say how many experts"),
    "a torch file that is none": (["{dir}/bad.pt", "--num-experts", "8"], "bad.pt: cannot be read"),
    "an array that is none": (["{dir}/bad.npy", "--num-experts", "8"], "bad.npy: cannot be read"),
    "too few experts": (["{dir}/rows.npy", "--num-experts", "7"], "rows.npy: ids: holds expert 7"),
    "two models": (["{dir}/a.npz", "{dir}/other.npz"], "other.npz: n_experts: 9, but 8"),
    "a profile of another model": (["{dir}/a.npz", "--profile", "{dir}/other.npz"], "other.npz: n_experts"),
    "no capacity": (["{dir}/a.npz", "--capacity", "0"], "--capacity 0: give percentages"),
    "a share for a percentage": (
        ["{dir}/a.npz", "--capacity", "0.25"],
        "--capacity 0.25: give percentages from 1 to 100",
    ),
    "too much capacity": (["{dir}/a.npz", "--capacity", "101"], "--capacity 101"),
    "no concurrency": (["{dir}/a.npz", "--concurrency", "0"], "--concurrency 0"),
    "no tokens": (["{dir}/a.npz", "--limit-tokens", "0"], "--limit-tokens 0"),
    "an expert without a size": (["{dir}/a.npz", "--expert-mib", "0"], "--expert-mib 0"),
    "quotas from nothing": (["{dir}/a.npz", "--pool", "quota"], "--pool quota needs --profile"),
    "static from nothing": (["{dir}/a.npz", "--policies", "static"], "--policies static needs --profile"),
    "forecasts from nowhere": (["{dir}/a.npz", "--policies", "predicted"], "--policies predicted needs a predictor's"),
    "a folder that is not there": (["{dir}/a.npz", "--json", "{dir}/no/r.json"], "its folder does not exist"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "a.npz")
    write_trace(tmp_path / "other.npz", num_experts=9)
    for name in ("text.npz", "bad.pt", "bad.npy"):
        (tmp_path / name).write_text("hello")
    np.save(tmp_path / "rows.npy", np.array([[[0, 7]]], dtype=np.int16))
    argv, message = MISTAKES[what]
    assert main(["replay", *(word.format(dir=tmp_path) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe-serve: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_an_unknown_policy_is_refused_with_the_choices(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["replay", trace, "--policies", "mru"])
    assert stopped.value.code == 2
    assert "invalid choice: 'mru'" in capsys.readouterr().err
