"""The flags of `bench serve`, and what they mean together. Spelt as `vllm bench serve` spells them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_serve.errors import ConfigError
from moe_serve.loadtest.api_key import add_key_flag
from moe_serve.loadtest.datasets import DATASETS, DatasetOptions
from moe_serve.loadtest.summary import GOODPUT_METRICS, METRIC_TITLES, SummaryOptions

ENDPOINT_OF: Mapping[str, str] = MappingProxyType(
    {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
)
SAMPLING_FLAGS = ("temperature", "top_p", "top_k")


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def add_flags(parser: argparse.ArgumentParser) -> None:
    _add_server_flags(parser.add_argument_group("server"))
    _add_load_flags(parser.add_argument_group("load"))
    _add_dataset_flags(parser.add_argument_group("data set"))
    _add_trace_flags(parser.add_argument_group("data set timed_trace"))
    _add_result_flags(parser.add_argument_group("results"))


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="Address of the server. Default: %(default)s.",
    )
    group.add_argument(
        "--backend", choices=sorted(ENDPOINT_OF), default="openai", help="Which API to call. Default: openai."
    )
    group.add_argument(
        "--endpoint", metavar="PATH", help="Default: /v1/completions, or /v1/chat/completions for openai-chat."
    )
    add_key_flag(group)
    group.add_argument("--model", metavar="NAME", help="Model to ask for. Default: the server's first.")
    group.add_argument(
        "--ready-check-timeout-s",
        type=float,
        default=0.0,
        metavar="S",
        help="Longest wait for the server to be ready, in seconds. Default: 0.",
    )
    group.add_argument(  # vLLM's spelling
        "--ready-check-timeout-sec",
        dest="ready_check_timeout_s",
        type=float,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num-prompts", type=positive, default=1000, metavar="N", help="Number of requests. Default: 1000."
    )
    group.add_argument(
        "--request-rate",
        type=positive_float,
        default=math.inf,
        metavar="R",
        help="Requests per second. Default: inf, all together.",
    )
    group.add_argument(
        "--burstiness",
        type=positive_float,
        default=1.0,
        metavar="B",
        help="Shape of the arrivals. 1: Poisson; below 1: bursts; above 1: even. Default: 1.",
    )
    group.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="Most requests in flight. Default: no limit."
    )
    group.add_argument("--num-warmups", type=int, default=0, metavar="N", help="Unmeasured requests first. Default: 0.")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="Answers have exactly the planned length. Default: on for random and timed_trace.",
    )
    group.add_argument("--temperature", type=float, metavar="X", help="Default: the server's.")
    group.add_argument("--top-p", type=float, metavar="X", help="Default: the server's.")
    group.add_argument("--top-k", type=int, metavar="N", help="Default: the server's.")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Same seed, same load. Default: 0.")


def _add_dataset_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-name", choices=sorted(DATASETS), default="random", help="Where prompts come from. Default: random."
    )
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="For sharegpt, custom and timed_trace.")
    for name, default, help in (
        ("--random-input-len", 1024, "random: prompt length in tokens."),
        ("--random-output-len", 128, "random: answer length in tokens."),
        ("--prefix-repetition-prefix-len", 256, "prefix_repetition: length of the shared prefix."),
        ("--prefix-repetition-suffix-len", 256, "prefix_repetition: length of each prompt's own suffix."),
        ("--prefix-repetition-num-prefixes", 10, "prefix_repetition: number of prefixes."),
        ("--prefix-repetition-output-len", 128, "prefix_repetition: answer length."),
        ("--custom-output-len", 256, "custom: answer length where a line has no output_tokens."),
    ):
        group.add_argument(name, type=positive, default=default, metavar="N", help=f"{help} Default: {default}.")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="random: lengths vary by this fraction. Default: 0.",
    )
    group.add_argument(
        "--sharegpt-output-len", type=positive, metavar="N", help="sharegpt: instead of the recorded length."
    )


def _add_trace_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--self-timed",
        action=argparse.BooleanOptionalAction,
        help="Requests come when the trace says, not at --request-rate. Default: on.",
    )
    for name, help in (
        ("--trace-time-scale", "Arrival times are multiplied by this: 0.5 is twice as fast. Default: 1."),
        ("--trace-length-scale", "Token counts are multiplied by this. Default: 1."),
    ):
        group.add_argument(name, type=positive_float, default=1.0, metavar="X", help=help)
    group.add_argument("--max-input-len", type=positive, metavar="N", help="Prompts are cut at this length.")
    group.add_argument("--max-output-len", type=positive, metavar="N", help="Answers are cut at this length.")


def _add_result_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput",
        nargs="+",
        metavar="M:MS",
        help="Limits such as ttft:200 tpot:50 e2el:2000; counts requests within all.",
    )
    group.add_argument(
        "--percentile-metrics", default=",".join(METRIC_TITLES), metavar="M,M", help="Default: %(default)s."
    )
    group.add_argument("--metric-percentiles", default="99", metavar="P,P", help="Default: %(default)s.")
    group.add_argument("--save-result", action="store_true", help="Write the JSON to a file as well.")
    group.add_argument("--save-detailed", action="store_true", help="With per-request lists in that file.")
    group.add_argument("--result-dir", type=Path, default=Path(), metavar="DIR", help="Default: here.")
    group.add_argument("--result-filename", metavar="NAME", help="Default: made from the settings and the date.")
    group.add_argument("--label", metavar="TEXT", help="Noted in the result.")
    group.add_argument("--disable-tqdm", action="store_true", help="Show no progress bar.")


def endpoint(args: argparse.Namespace) -> str:
    """The path requests go to."""
    return str(args.endpoint or ENDPOINT_OF[args.backend])


def request_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields every request carries; what is not asked for is left to the server."""
    settings = {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}
    ignore_eos = args.dataset_name in ("random", "timed_trace") if args.ignore_eos is None else args.ignore_eos
    return {**settings, "ignore_eos": True} if ignore_eos else settings


def dataset_options(args: argparse.Namespace) -> DatasetOptions:
    if not 0 <= args.random_range_ratio < 1:
        raise ConfigError(f"--random-range-ratio must be at least 0 and below 1, got {args.random_range_ratio}")
    return DatasetOptions(**{field.name: getattr(args, field.name) for field in fields(DatasetOptions)})


def summary_options(args: argparse.Namespace) -> SummaryOptions:
    metrics = tuple(args.percentile_metrics.split(","))
    for metric in metrics:
        if metric not in METRIC_TITLES:
            raise ConfigError(f"--percentile-metrics: {metric!r} is not one of {', '.join(METRIC_TITLES)}")
    return SummaryOptions(metrics, _percentiles(args.metric_percentiles), _goodput(args.goodput or []))


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(p) for p in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(0 <= p <= 100 for p in values):
        raise ConfigError(f"--metric-percentiles takes numbers from 0 to 100 with commas between, got {text!r}")
    return values


def _goodput(limits: Sequence[str]) -> dict[str, float]:
    found = {}
    for limit in limits:
        metric, _, milliseconds = limit.partition(":")
        if metric not in GOODPUT_METRICS or not milliseconds.replace(".", "", 1).isdigit():
            raise ConfigError(f"--goodput takes {', '.join(f'{m}:MS' for m in GOODPUT_METRICS)}; got {limit!r}")
        found[metric] = float(milliseconds)
    return found
