"""When and what `bench serve` sends: arrivals, traces and data sets, without a server."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_serve.cli import parse
from moe_serve.errors import ConfigError
from moe_serve.loadtest.arrival_traces import TraceEntry, read_trace
from moe_serve.loadtest.datasets import DatasetOptions, Pieces, PlannedRequest, plan_requests
from moe_serve.loadtest.flags import dataset_options
from moe_serve.loadtest.measure import arrival_times
from moe_serve.loadtest.vocabulary import Vocabulary

REAL_TRACES = Path(__file__).resolve().parents[4] / "shared" / "data" / "arrivals"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.4799600,110,27
2023-11-16 18:17:05.9799600,7433,14
2023-11-16 18:17:06.9799600,34,12
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 1030, "output_length": 490, "hash_ids": [0, 1, 3]}
{"timestamp": 3000, "input_length": 600, "output_length": 794, "hash_ids": [0, 4]}
{"timestamp": 3000, "input_length": 512, "output_length": 1, "hash_ids": [9]}
{"timestamp": 27250, "input_length": 2000, "output_length": 3, "hash_ids": [0, 1, 2, 5]}
"""


def options(*flags: str) -> DatasetOptions:
    args: argparse.Namespace = parse(["bench", "serve", *flags])
    return dataset_options(args)


def pieces(request: PlannedRequest) -> Pieces:
    assert not isinstance(request.prompt, str)
    return request.prompt


def length(request: PlannedRequest) -> int:
    return sum(tokens for _, tokens in pieces(request))


@pytest.fixture
def file_with(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# ---- arrivals ---------------------------------------------------------------------------------------


def test_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, random.Random(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float) -> None:
    times = arrival_times(20_000, 5.0, burstiness, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = statistics.fmean(gaps)
    assert times[0] == 0
    assert mean == pytest.approx(0.2, rel=0.05)
    # A gamma distribution of shape k varies by 1 / sqrt(k) of its mean.
    assert statistics.pstdev(gaps) / mean == pytest.approx(burstiness**-0.5, rel=0.05)


# ---- traces -----------------------------------------------------------------------------------------


def test_azure_rows(file_with: Callable[[str, str], Path]) -> None:
    entries = read_trace(file_with("azure.csv", AZURE), limit=4)
    assert [e.input_tokens for e in entries] == [4808, 3180, 110, 7433]
    assert [e.output_tokens for e in entries] == [10, 8, 27, 14]
    assert [e.arrival_s for e in entries] == pytest.approx([0.0, 0.052, 0.5, 2.0], abs=1e-5)


def test_mooncake_rows(file_with: Callable[[str, str], Path]) -> None:
    entries = read_trace(file_with("mooncake.jsonl", MOONCAKE), limit=100)
    assert entries[0] == TraceEntry(0.0, 1100, 500, (0, 1, 2))
    assert entries[-1] == TraceEntry(27.25, 2000, 3, (0, 1, 2, 5))
    assert len(entries) == 5


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2 is not an Azure"),
        ("a.csv", "when,what\n1,2\n", "line 2 is not an Azure"),
        ("a.jsonl", '{"timestamp": 0}\n', "line 1 is not a Mooncake"),
        ("a.jsonl", "not json\n", "line 1 is not a Mooncake"),
        ("a.jsonl", "", "holds no request"),
        ("a.txt", "", "neither .csv"),
    ],
)
def test_a_bad_trace_names_the_line(
    file_with: Callable[[str, str], Path], name: str, text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_trace(file_with(name, text), limit=10)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.csv", limit=1)


@pytest.mark.skipif(not REAL_TRACES.is_dir(), reason=f"the real traces are not at {REAL_TRACES}")
@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("AzureLLMInferenceTrace_code.csv", (4808, 10)),
        ("AzureLLMInferenceTrace_conv.csv", (374, 44)),
        ("mooncake_conversation_trace.jsonl", (6758, 500)),
        ("mooncake_synthetic_trace.jsonl", (40160, 6)),
    ],
)
def test_the_real_traces_are_read(name: str, tokens: tuple[int, int]) -> None:
    entries = read_trace(REAL_TRACES / name, limit=1000)
    assert len(entries) == 1000
    assert (entries[0].input_tokens, entries[0].output_tokens) == tokens
    assert entries[-1].arrival_s > 0


# ---- data sets --------------------------------------------------------------------------------------


def test_random_lengths_stay_in_range_and_repeat_with_the_seed() -> None:
    flags = ["--num-prompts", "200", "--random-input-len", "100", "--random-output-len", "10"]
    chosen = options(*flags, "--random-range-ratio", "0.5")
    plan = plan_requests(chosen)
    assert plan == plan_requests(chosen)
    assert plan != plan_requests(dataclasses.replace(chosen, seed=1))
    assert (min(map(length, plan)), max(map(length, plan))) == pytest.approx((50, 150), abs=3)
    assert {r.output_tokens for r in plan} == set(range(5, 16))
    assert {length(r) for r in plan_requests(options(*flags))} == {100}


def test_prefixes_repeat_evenly_and_suffixes_do_not() -> None:
    flags = ("--prefix-repetition-num-prefixes", "4", "--prefix-repetition-prefix-len", "30")
    plan = plan_requests(options("--dataset-name", "prefix_repetition", "--num-prompts", "40", *flags))
    prefixes = [pieces(r)[0] for r in plan]
    assert [prefixes.count(p) for p in set(prefixes)] == [10] * 4
    assert {tokens for _, tokens in prefixes} == {30}
    assert len({pieces(r)[1] for r in plan}) == 40


def test_trace_scales_and_limits(file_with: Callable[[str, str], Path]) -> None:
    path = str(file_with("azure.csv", AZURE))
    flags = ["--trace-time-scale", "0.5", "--trace-length-scale", "0.1", "--max-input-len", "400"]
    flags += ["--max-output-len", "2"]
    plan = plan_requests(options("--dataset-name", "timed_trace", "--dataset-path", path, *flags))
    assert [length(r) for r in plan] == [400, 318, 11, 400, 3]
    assert [r.output_tokens for r in plan] == [1, 1, 2, 1, 1]
    assert [r.arrival_s for r in plan] == pytest.approx([0.0, 0.026, 0.25, 1.0, 1.5], abs=1e-5)


@pytest.mark.parametrize("scale", ["1", "0.1", "0.013"])
def test_mooncake_hashes_become_shared_prefixes(file_with: Callable[[str, str], Path], scale: str) -> None:
    path = str(file_with("mooncake.jsonl", MOONCAKE))
    flags = ("--dataset-name", "timed_trace", "--dataset-path", path, "--trace-length-scale", scale)
    plan = plan_requests(options(*flags))
    vocabulary = Vocabulary(tuple(range(5000)), 1.0)
    first, second, third, other, last = (vocabulary.spell_ids(pieces(r)) for r in plan)
    block = round(512 * float(scale))
    two_blocks = round(2 * 512 * float(scale))
    assert [len(t) for t in (first, last)] == [round(n * float(scale)) for n in (1100, 2000)]
    assert first[:two_blocks] == second[:two_blocks] == last[:two_blocks]
    assert last[: len(first)] == first, "a cut last block is a prefix of the whole one"
    assert third[:block] == first[:block] != other[:block]
    assert first[two_blocks:] != second[two_blocks : len(first)]


def test_tokens_beyond_the_hashes_are_a_requests_own(file_with: Callable[[str, str], Path]) -> None:
    row = {"timestamp": 0, "input_length": 700, "output_length": 1, "hash_ids": [0]}
    path = str(file_with("m.jsonl", "\n".join([json.dumps(row)] * 2)))
    plan = plan_requests(options("--dataset-name", "timed_trace", "--dataset-path", path))
    assert [length(r) for r in plan] == [700, 700]
    assert pieces(plan[0])[0] == pieces(plan[1])[0]
    assert pieces(plan[0])[1] != pieces(plan[1])[1]


def test_custom_lines(file_with: Callable[[str, str], Path]) -> None:
    path = str(file_with("c.jsonl", '{"prompt": "one", "output_tokens": 3}\n{"prompt": "two"}\n'))
    plan = plan_requests(options("--dataset-name", "custom", "--dataset-path", path, "--custom-output-len", "9"))
    assert {(r.prompt, r.output_tokens) for r in plan} == {("one", 3), ("two", 9)}


def test_sharegpt_takes_the_first_exchange(file_with: Callable[[str, str], Path]) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello there"}, {"from": "human", "value": "x"}]
    path = str(file_with("s.json", json.dumps([{"conversations": turns}, {"conversations": turns[:1]}])))
    flags = ("--dataset-name", "sharegpt", "--dataset-path", path)
    assert plan_requests(options(*flags)) == [PlannedRequest("hi", None, reference="hello there")]
    assert plan_requests(options(*flags, "--sharegpt-output-len", "5"))[0].output_tokens == 5


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--dataset-name", "custom"), "custom needs --dataset-path"),
        (("--dataset-name", "custom", "--dataset-path", "/nowhere.jsonl"), "cannot read"),
        (("--random-range-ratio", "1"), "--random-range-ratio must be"),
    ],
)
def test_impossible_options(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_requests(options(*flags))


@pytest.mark.parametrize("line", ['{"text": "x"}', '{"prompt": 5}', '{"prompt": ""}'])
def test_a_custom_line_without_a_prompt_is_named(file_with: Callable[[str, str], Path], line: str) -> None:
    path = str(file_with("c.jsonl", '{"prompt": "fine"}\n' + line))
    with pytest.raises(ConfigError, match="entry 2 has no text under 'prompt'"):
        plan_requests(options("--dataset-name", "custom", "--dataset-path", path))
