"""What is sent: requests planned from a data set, before anything is known of the server's tokenizer.

A synthetic prompt is a tuple of pieces (seed, length in tokens): equal pieces become equal tokens,
so prefix sharing is planned here and spelt out by `vocabulary.py`. Example: two prompts
((7, 256), (100, 20)) and ((7, 256), (101, 20)) share their first 256 tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_serve.errors import ConfigError
from moe_serve.loadtest.arrival_traces import MOONCAKE_BLOCK_TOKENS, TraceEntry, read_trace

Pieces = tuple[tuple[int, int], ...]
PIECE_SEEDS = 2**48
"""Random pieces draw their seeds from this many, far above any trace's hash ids."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A prompt, given as text or as pieces, and how long its answer may be."""

    prompt: str | Pieces
    output_tokens: int | None
    """None: as long as the recorded answer, whose text is `reference`."""
    arrival_s: float | None = None
    """Set by traces, which know when requests came."""
    reference: str = ""


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """The flags of `bench serve` that choose and shape a data set, by their names."""

    dataset_name: str
    dataset_path: Path | None
    num_prompts: int
    seed: int
    random_input_len: int
    random_output_len: int
    random_range_ratio: float
    prefix_repetition_prefix_len: int
    prefix_repetition_suffix_len: int
    prefix_repetition_num_prefixes: int
    prefix_repetition_output_len: int
    custom_output_len: int
    sharegpt_output_len: int | None
    trace_time_scale: float
    trace_length_scale: float
    max_input_len: int | None
    max_output_len: int | None


def plan_requests(options: DatasetOptions) -> list[PlannedRequest]:
    """At most `num_prompts` requests; files may hold fewer. The same options give the same plan."""
    return DATASETS[options.dataset_name](options, random.Random(options.seed))


def _random(options: DatasetOptions, rng: random.Random) -> list[PlannedRequest]:
    def one() -> PlannedRequest:
        piece = (_piece_seed(rng), _around(options.random_input_len, options.random_range_ratio, rng))
        return PlannedRequest((piece,), _around(options.random_output_len, options.random_range_ratio, rng))

    return [one() for _ in range(options.num_prompts)]


def _around(length: int, ratio: float, rng: random.Random) -> int:
    """Uniform in length * [1 - ratio, 1 + ratio], at least 1."""
    return max(1, rng.randint(int(length * (1 - ratio)), int(length * (1 + ratio))))


def _piece_seed(rng: random.Random) -> int:
    return PIECE_SEEDS + rng.randrange(PIECE_SEEDS)


def _prefix_repetition(options: DatasetOptions, rng: random.Random) -> list[PlannedRequest]:
    """`num_prefixes` prefixes in turn, each request with a suffix of its own, in random order."""
    count, length = options.prefix_repetition_num_prefixes, options.prefix_repetition_prefix_len
    prefixes = [(_piece_seed(rng), length) for _ in range(count)]
    requests = []
    for i in range(options.num_prompts):
        suffix = _piece_seed(rng), options.prefix_repetition_suffix_len
        requests.append(PlannedRequest((prefixes[i % count], suffix), options.prefix_repetition_output_len))
    rng.shuffle(requests)
    return requests


def _timed_trace(options: DatasetOptions, rng: random.Random) -> list[PlannedRequest]:
    return [_from_trace(entry, options, rng) for entry in read_trace(_path(options), options.num_prompts)]


def _from_trace(entry: TraceEntry, options: DatasetOptions, rng: random.Random) -> PlannedRequest:
    pieces = _trace_pieces(entry, options.trace_length_scale, _piece_seed(rng))
    output = max(1, round(entry.output_tokens * options.trace_length_scale))
    return PlannedRequest(
        _cut(pieces, options.max_input_len),
        min(output, options.max_output_len or output),
        arrival_s=entry.arrival_s * options.trace_time_scale,
    )


def _trace_pieces(entry: TraceEntry, scale: float, own_seed: int) -> Pieces:
    """One piece per hash id, then one of its own for tokens that no hash id covers.

    Scaled block lengths depend on the block's position alone, so that prefixes shared in the trace
    stay shared. Example: scale 0.01, blocks end at tokens 5, 10, 15, 20, 26, 31 ...
    """
    total = max(1, round(entry.input_tokens * scale))
    ends = [round(MOONCAKE_BLOCK_TOKENS * scale * i) for i in range(len(entry.hash_ids) + 1)]
    blocks = tuple((hash_id, ends[i + 1] - ends[i]) for i, hash_id in enumerate(entry.hash_ids))
    return _cut((*blocks, (own_seed, max(0, total - ends[-1]))), total)


def _cut(pieces: Pieces, limit: int | None) -> Pieces:
    """The first `limit` tokens. Cutting the end keeps shared prefixes shared."""
    if limit is None:
        return pieces
    kept: list[tuple[int, int]] = []
    for seed, length in pieces:
        if limit > 0 and length > 0:
            kept.append((seed, min(length, limit)))
        limit -= length
    return tuple(kept)


def _custom(options: DatasetOptions, rng: random.Random) -> list[PlannedRequest]:
    """Lines {"prompt": ..., "output_tokens": optional}."""
    plan = [
        PlannedRequest(_text(row, "prompt", number), int(row.get("output_tokens", options.custom_output_len)))
        for number, row in _rows(options)
    ]
    return _sample(plan, options, rng)


def _sharegpt(options: DatasetOptions, rng: random.Random) -> list[PlannedRequest]:
    """The first question of each {"conversations": [{"value": ...}, ...]}; answers as long as recorded."""
    plan = []
    for number, row in _rows(options):
        turns = row.get("conversations") or []
        if len(turns) >= 2:
            question, answer = _text(turns[0], "value", number), _text(turns[1], "value", number)
            plan.append(PlannedRequest(question, options.sharegpt_output_len, reference=answer))
    return _sample(plan, options, rng)


def _sample(plan: list[PlannedRequest], options: DatasetOptions, rng: random.Random) -> list[PlannedRequest]:
    if not plan:
        raise ConfigError(f"--dataset-path: {options.dataset_path} holds no usable request")
    return rng.sample(plan, min(len(plan), options.num_prompts))


def _path(options: DatasetOptions) -> Path:
    if options.dataset_path is None:
        raise ConfigError(f"--dataset-name {options.dataset_name} needs --dataset-path")
    return options.dataset_path


def _rows(options: DatasetOptions) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number, object) for each of the file's."""
    return enumerate(read_rows(_path(options), "--dataset-path"), start=1)


def read_rows(path: Path, flag: str) -> list[Any]:
    """The elements of a .json list, or the lines of a .jsonl file. ConfigError names `flag` and the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error}") from error
    try:
        is_list = path.suffix == ".json"
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"{flag}: {path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ConfigError(f"{flag}: {path} holds no list")
    return rows


def _text(row: Mapping[str, Any], key: str, number: int) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"--dataset-path: entry {number} has no text under {key!r}")
    return value


DATASETS: Mapping[str, Callable[[DatasetOptions, random.Random], list[PlannedRequest]]] = MappingProxyType(
    {
        "random": _random,
        "sharegpt": _sharegpt,
        "custom": _custom,
        "timed_trace": _timed_trace,
        "prefix_repetition": _prefix_repetition,
    }
)
