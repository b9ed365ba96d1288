"""From outcomes to figures: the result keys of `vllm bench serve`, and rows of the same numbers.

Pure arithmetic; knows nothing of HTTP or of data sets.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moe_serve.loadtest.client import Outcome

METRIC_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "ttft": "Time to first token",
        "tpot": "Time per output token after the first",
        "itl": "Inter-token latency",
        "e2el": "End-to-end latency",
    }
)
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
DETAIL_KEYS = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "generated_texts", "errors")


@dataclass(frozen=True, slots=True)
class SummaryOptions:
    """Which figures are wanted."""

    metrics: tuple[str, ...]
    percentiles: tuple[float, ...]
    goodput_ms: Mapping[str, float]
    """Limit in ms by metric; empty: goodput is not asked for."""


def summarise(outcomes: Sequence[Outcome], duration_s: float, options: SummaryOptions) -> dict[str, Any]:
    """All figures, with the per-request lists under DETAIL_KEYS last."""
    done = [o for o in outcomes if o.success]
    inputs, outputs = sum(o.input_tokens for o in done), sum(o.output_tokens for o in done)
    good = sum(_is_good(o, options.goodput_ms) for o in done)
    return {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration_s,
        "request_goodput": good / duration_s if options.goodput_ms else None,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "max_output_tokens_per_s": _peak_tokens_per_s(done),
        "max_concurrent_requests": _peak_concurrency(done),
        "rtfx": 0.0,
        **_latencies(done, options),
        **_details(outcomes),
    }


def _latencies(done: Sequence[Outcome], options: SummaryOptions) -> dict[str, float]:
    figures: dict[str, float] = {}
    for metric in options.metrics:
        values_ms = [1000 * v for v in _values_s(metric, done)]
        figures[f"mean_{metric}_ms"] = statistics.fmean(values_ms) if values_ms else 0.0
        figures[f"median_{metric}_ms"] = percentile(values_ms, 50)
        figures[f"std_{metric}_ms"] = statistics.pstdev(values_ms) if values_ms else 0.0
        for p in options.percentiles:
            figures[f"p{p:g}_{metric}_ms"] = percentile(values_ms, p)
    return figures


def _values_s(metric: str, done: Sequence[Outcome]) -> list[float]:
    if metric == "itl":
        return [gap for o in done for gap in o.itls_s]
    if metric == "tpot":
        return [o.tpot_s for o in done if o.output_tokens > 1]
    return [o.ttft_s if metric == "ttft" else o.latency_s for o in done]


def percentile(values: Sequence[float], p: float) -> float:
    """Linear between the two nearest ranks; 0 of nothing.

    Example: the 50th percentile of 1, 2, 10, 20 is 6.
    """
    import numpy as np  # not above: flags.py is read for --help

    return float(np.percentile(values, p)) if values else 0.0


def _is_good(outcome: Outcome, limits_ms: Mapping[str, float]) -> bool:
    measured_s = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2el": outcome.latency_s}
    return all(1000 * measured_s[metric] <= limit for metric, limit in limits_ms.items())


def _peak_tokens_per_s(done: Sequence[Outcome]) -> float:
    """Pieces received in the busiest whole second since the first request."""
    first_s = min((o.start_s for o in done), default=0.0)
    seconds = Counter(int(o.start_s + t - first_s) for o in done for t in o.token_times_s)
    return float(max(seconds.values(), default=0))


def _peak_concurrency(done: Sequence[Outcome]) -> int:
    """Most requests in flight at one instant; one that ends as another starts does not overlap it."""
    changes = sorted([(o.start_s, 1) for o in done] + [(o.start_s + o.latency_s, -1) for o in done])
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak


def _details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "input_lens": [o.input_tokens for o in outcomes],
        "output_lens": [o.output_tokens for o in outcomes],
        "ttfts": [o.ttft_s for o in outcomes],
        "itls": [o.itls_s for o in outcomes],
        "latencies": [o.latency_s for o in outcomes],
        "start_times": [o.start_s for o in outcomes],
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error or "" for o in outcomes],
    }


def without_details(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in DETAIL_KEYS}


def sections(result: Mapping[str, Any], options: SummaryOptions) -> list[tuple[str, list[tuple[str, str]]]]:
    """The figures for people: titles, and rows of (name, number) under each."""
    found = [("Requests", [(title, _shown(result[key])) for title, key in _HEADLINES if result[key] is not None])]
    for metric in options.metrics:
        words = ["mean", "median", "std", *(f"p{p:g}" for p in options.percentiles)]
        rows = [(f"{word} {metric}", _shown(result[f"{word}_{metric}_ms"])) for word in words]
        found.append((f"{METRIC_TITLES[metric]} (ms)", rows))
    return found


def _shown(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


_HEADLINES = (
    ("completed requests", "completed"),
    ("failed requests", "failed"),
    ("duration (s)", "duration"),
    ("input tokens", "total_input_tokens"),
    ("output tokens", "total_output_tokens"),
    ("requests per second", "request_throughput"),
    ("requests within goodput limits per s", "request_goodput"),
    ("output tokens per second", "output_throughput"),
    ("all tokens per second", "total_token_throughput"),
    ("peak output tokens per second", "max_output_tokens_per_s"),
    ("peak concurrent requests", "max_concurrent_requests"),
)
