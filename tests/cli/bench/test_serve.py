"""`moe-serve bench serve` against a stub server with known delays."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_serve.cli import main
from tests.patience import on_a_quiet_moment

VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests", "rtfx",
    *(f"{word}_{metric}_ms" for word in ("mean", "median", "std", "p99") for metric in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip
FIRST_MS = 50
NEXT_MS = 10

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(stub: Any, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run the command against the stub; its status must be `status`; the JSON on its last line."""

    def run(*flags: str, status: int = 0) -> dict[str, Any]:
        assert main(["bench", "serve", "--base-url", stub.url, "--disable-tqdm", *flags]) == status
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    return run


RANDOM = ("--num-prompts", "8", "--random-input-len", "20", "--random-output-len", "5")


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_counts_and_delays(bench: Bench, stub: Any, backend: str) -> None:
    def check() -> None:
        start = time.perf_counter()
        result = bench(*RANDOM, "--backend", backend)
        took_s = time.perf_counter() - start
        assert set(result) == VLLM_KEYS
        assert (result["completed"], result["failed"], result["model_id"]) == (8, 0, "stub-model")
        assert result["total_output_tokens"] == 40
        assert FIRST_MS <= result["median_ttft_ms"] <= result["p99_ttft_ms"] <= result["p99_e2el_ms"]
        assert result["mean_itl_ms"] >= NEXT_MS
        assert result["mean_tpot_ms"] == pytest.approx(result["mean_itl_ms"], rel=0.01)
        assert result["mean_e2el_ms"] == pytest.approx(result["mean_ttft_ms"] + 4 * result["mean_itl_ms"], rel=0.01)
        assert result["p99_e2el_ms"] <= 1000 * result["duration"] <= 1000 * took_s
        assert result["max_concurrent_requests"] == 8
        assert all(body["ignore_eos"] for body in stub.bodies)

    on_a_quiet_moment(check)


def test_completions_get_token_ids_of_the_exact_length(bench: Bench, stub: Any) -> None:
    assert bench(*RANDOM)["total_input_tokens"] == 160
    ids = {token for body in stub.bodies for token in body["prompt"]}
    assert ids <= set(range(1000, 1020)), "ids come from /tokenize, without its begin-of-sequence mark"


def test_without_tokenize_low_ids_stand_in(bench: Bench, stub: Any) -> None:
    stub.has_tokenize = False
    assert bench(*RANDOM)["total_input_tokens"] == 160
    assert {token for body in stub.bodies for token in body["prompt"]} <= set(range(256))


def test_chat_gets_text_of_about_the_length(bench: Bench, stub: Any) -> None:
    assert bench(*RANDOM, "--backend", "openai-chat")["total_input_tokens"] == pytest.approx(160, rel=0.1)
    assert isinstance(stub.bodies[0]["messages"][0]["content"], str)


def test_max_concurrency_is_kept(bench: Bench) -> None:
    result = bench(*RANDOM, "--max-concurrency", "2")
    assert result["max_concurrent_requests"] <= 2
    assert result["duration"] >= 4 * (FIRST_MS + 4 * NEXT_MS) / 1000


def test_request_rate_spreads_arrivals(bench: Bench, stub: Any) -> None:
    def check() -> None:
        stub.times.clear()
        result = bench(*RANDOM, "--request-rate", "20", "--burstiness", "1000")
        gaps = [b - a for a, b in itertools.pairwise(stub.times)]
        assert sum(gaps) == pytest.approx(7 / 20, rel=0.3)
        assert result["request_rate"] == 20

    on_a_quiet_moment(check)


def test_failures_are_counted(bench: Bench, stub: Any, tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    prompts = ["well done", "please fail", "midway", "empty", "also well"]
    path.write_text("\n".join(json.dumps({"prompt": p, "output_tokens": 4}) for p in prompts))
    result = bench("--dataset-name", "custom", "--dataset-path", str(path))
    assert (result["completed"], result["failed"]) == (2, 3)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (4, 8)
    assert "ignore_eos" not in stub.bodies[0]


def test_each_kind_of_failure_is_named(stub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p}) for p in ("fail", "midway", "empty", "fail")))
    flags = ("--dataset-name", "custom", "--dataset-path", str(path), "--custom-output-len", "4", "--disable-tqdm")
    assert main(["bench", "serve", "--base-url", stub.url, *flags]) == 1
    err = capsys.readouterr().err
    assert "2 failed: the server answered 503: the queue is full" in err
    assert "1 failed: out of pages" in err
    assert "1 failed: the stream ended without a token" in err


def test_a_trace_is_replayed_at_its_times(bench: Bench, stub: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": t, "input_length": 40, "output_length": 2, "hash_ids": [3]} for t in (0, 200, 600)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    flags = ("--dataset-name", "timed_trace", "--dataset-path", str(path))

    def check() -> None:
        stub.times.clear()
        result = bench(*flags, "--trace-time-scale", "0.5", "--trace-length-scale", "0.5")
        gaps = [b - a for a, b in itertools.pairwise(stub.times)]
        assert gaps == pytest.approx([0.1, 0.2], abs=0.08)
        assert (result["total_input_tokens"], result["num_prompts"]) == (60, 3)
        assert stub.bodies[0]["prompt"] == stub.bodies[1]["prompt"]

    on_a_quiet_moment(check)


def test_goodput_and_chosen_metrics(bench: Bench) -> None:
    flags = ("--goodput", "ttft:5000", "e2el:1", "--percentile-metrics", "ttft", "--metric-percentiles", "50,99.5")
    result = bench(*RANDOM, *flags)
    assert result["request_goodput"] == 0
    assert {key for key in result if key.endswith("_ms")} == {
        f"{word}_ttft_ms" for word in ("mean", "median", "std", "p50", "p99.5")
    }


def test_results_are_saved(bench: Bench, tmp_path: Path) -> None:
    flags = ("--save-result", "--save-detailed", "--result-dir", str(tmp_path / "new"), "--result-filename", "r.json")
    printed = bench(*RANDOM, *flags, "--label", "mine")
    saved = json.loads((tmp_path / "new" / "r.json").read_text())
    assert saved.items() >= printed.items()
    assert len(saved["ttfts"]) == 8
    assert saved["label"] == "mine"


def test_the_api_key_and_sampling_settings_are_sent(bench: Bench, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    bench("--num-prompts", "1", "--random-output-len", "1", "--temperature", "0", "--num-warmups", "1")
    assert [body["temperature"] for body in stub.bodies] == [0, 0]
    assert "top_p" not in stub.bodies[0]
    assert stub.headers[b"authorization"] == b"Bearer secret"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--goodput", "itl:5"), "--goodput takes ttft:MS"),
        (("--goodput", "ttft:fast"), "--goodput takes ttft:MS"),
        (("--percentile-metrics", "ttft,speed"), "'speed' is not one of"),
        (("--metric-percentiles", "101"), "numbers from 0 to 100"),
        (("--dataset-name", "sharegpt"), "needs --dataset-path"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_sent(
    flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9", *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9", *RANDOM]) == 1
    assert capsys.readouterr().err.startswith("moe-serve: error: no model at http://127.0.0.1:9")
