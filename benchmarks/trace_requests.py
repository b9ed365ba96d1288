"""Requests with the arrivals and lengths of recorded traces (Azure 2023, Mooncake), scaled to a small model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.loadtest.arrival_traces import TraceEntry, read_trace

SCALE = {".csv": (8, 8), ".jsonl": (64, 8)}
"""Prompt and answer tokens are divided by these: mean prompts become about 150 (Azure) and 190 (Mooncake)."""
BLOCK_TOKENS = 8
"""Mooncake's blocks of 512 tokens, scaled: equal ids stand for equal tokens, so prefixes stay shared."""
FIRST_TOKEN = 10
"""Below are special tokens."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request and when it is due, in seconds at the trace's own pace."""

    arrival_s: float
    body: dict[str, Any]


def read_requests(path: Path, max_len: int, vocab_size: int, limit: int = 12000) -> list[TraceRequest]:
    """The trace's requests, none longer than `max_len` tokens together."""
    prompt_scale, answer_scale = SCALE[path.suffix]
    requests = []
    for number, entry in enumerate(read_trace(path, limit)):
        answer = max(2, min(entry.output_tokens // answer_scale, max_len // 4))
        length = max(4, min(entry.input_tokens // prompt_scale, max_len - answer))
        prompt = _prompt(entry, length, number, vocab_size)
        body = {"prompt": prompt, "max_tokens": answer, "ignore_eos": True, "temperature": 0, "stream": True}
        requests.append(TraceRequest(entry.arrival_s, body))
    return requests


def _prompt(entry: TraceEntry, length: int, number: int, vocab_size: int) -> list[int]:
    if not entry.hash_ids:
        rng = random.Random(-1 - number)
        return [rng.randrange(FIRST_TOKEN, vocab_size) for _ in range(length)]
    blocks = (random.Random(i) for i in entry.hash_ids)
    tokens = [rng.randrange(FIRST_TOKEN, vocab_size) for rng in blocks for _ in range(BLOCK_TOKENS)]
    return (tokens * (1 + length // len(tokens)))[:length]


def schedule(traces: Sequence[Sequence[TraceRequest]], rate: float, duration_s: float) -> list[TraceRequest]:
    """All traces overlaid, each at an equal share of `rate` requests per second; repeated if too short."""
    merged = [r for trace in traces for r in _paced(trace, rate / len(traces), duration_s)]
    return sorted(merged, key=lambda r: r.arrival_s)


def _paced(trace: Sequence[TraceRequest], rate: float, duration_s: float) -> Iterator[TraceRequest]:
    """Its first requests, as many as are needed, stretched or squeezed in time: bursts keep their shape."""
    count = max(1, round(rate * duration_s))
    used = list(itertools.islice(trace, count))
    span_s = used[-1].arrival_s + used[-1].arrival_s / len(used)
    stretch = (len(used) / rate) / span_s if span_s else 0.0
    for i in range(count):
        lap, place = divmod(i, len(used))
        yield TraceRequest((used[place].arrival_s + lap * span_s) * stretch, used[place].body)
