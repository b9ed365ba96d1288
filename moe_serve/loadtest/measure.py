"""One load test from its settings to its figures: wait for the server, spell prompts, warm up, send, summarise."""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, aclosing
from datetime import datetime
from typing import Any

from moe_serve.errors import MoEServeError
from moe_serve.loadtest.api_key import headers_of
from moe_serve.loadtest.client import Clients, Outcome, Target, send, send_all, wait_until_ready
from moe_serve.loadtest.datasets import PlannedRequest
from moe_serve.loadtest.flags import endpoint, request_settings
from moe_serve.loadtest.summary import SummaryOptions, summarise
from moe_serve.loadtest.vocabulary import ReadyRequest, TokenCounter, spell


async def measure(
    args: argparse.Namespace,
    plan: list[PlannedRequest],
    options: SummaryOptions,
    progress: Callable[[int], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """The result, under vLLM's keys. `args`: what flags.py defines. `progress(total)`: a bar with `update()`."""
    async with aclosing(Clients(args.base_url, headers_of(args.api_key))) as clients, clients.take() as client:
        first_model = await wait_until_ready(client, args.ready_check_timeout_s)
        target = Target(endpoint(args), args.model or first_model, request_settings(args))
        requests = await spell(plan, TokenCounter(client, target.model), as_text=target.is_chat)
        for request in requests[: args.num_warmups]:
            _require_success(await send(client, target, request))
        with progress(len(requests)) as bar:
            outcomes, duration_s = await send_all(
                clients, target, requests, _arrivals(args, requests), args.max_concurrency, bar.update
            )
    return {**_header(args, target, len(requests)), **summarise(outcomes, duration_s, options)}


def _arrivals(args: argparse.Namespace, requests: Sequence[ReadyRequest]) -> list[float]:
    recorded = [r.arrival_s for r in requests if r.arrival_s is not None]
    if args.self_timed is not False and len(recorded) == len(requests):
        return recorded
    return arrival_times(len(requests), args.request_rate, args.burstiness, random.Random(args.seed))


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Arrival times at a mean rate of `rate` per second, the first at 0; rate inf: all at 0.

    Gaps follow a gamma distribution of shape `burstiness` and mean 1 / rate: 1 is a Poisson
    process, below 1 comes in bursts, above 1 is more even. Example: rate 2, four requests of a
    very even process: about 0, 0.5, 1, 1.5.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = (rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))[:count]


def _header(args: argparse.Namespace, target: Target, num_prompts: int) -> dict[str, Any]:
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": target.model,
        "tokenizer_id": None,
        "num_prompts": num_prompts,
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }


def _require_success(outcome: Outcome) -> None:
    if outcome.error is not None:
        raise MoEServeError(f"a warm-up request failed: {outcome.error}")
