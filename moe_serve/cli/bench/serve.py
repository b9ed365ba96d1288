"""`moe-serve bench serve`: load on any OpenAI-compatible server, with the flags and results of vLLM's.

stdout: a table, then one line of JSON, always the last. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_serve.errors import MoEServeError
from moe_serve.loadtest.api_key import headers_of
from moe_serve.loadtest.arrivals import arrival_times
from moe_serve.loadtest.client import Clients, Outcome, Target, send, send_all, wait_until_ready
from moe_serve.loadtest.datasets import PlannedRequest, plan_requests
from moe_serve.loadtest.flags import add_flags, dataset_options, endpoint, request_settings, summary_options
from moe_serve.loadtest.summary import SummaryOptions, summarise, table, without_details
from moe_serve.loadtest.vocabulary import ReadyRequest, TokenCounter, spell
from moe_serve_base.whole_files import write_text

HELP = "Measure an OpenAI-compatible server under load."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Status 1 if no request succeeded."""
    options = summary_options(args)
    plan = plan_requests(dataset_options(args))  # before the server is asked: a bad file should not wait for it
    result = asyncio.run(_measure(args, plan, options))
    print(table(result, options))
    if args.save_result:
        _save(args, result)
    print(json.dumps(without_details(result)))
    return 0 if result["completed"] else 1


async def _measure(args: argparse.Namespace, plan: list[PlannedRequest], options: SummaryOptions) -> dict[str, Any]:
    async with aclosing(Clients(args.base_url, headers_of(args.api_key))) as clients, clients.take() as client:
        first_model = await wait_until_ready(client, args.ready_check_timeout_s)
        target = Target(endpoint(args), args.model or first_model, request_settings(args))
        requests = await spell(plan, TokenCounter(client, target.model), as_text=target.is_chat)
        for request in requests[: args.num_warmups]:
            _require_success(await send(client, target, request))
        with _progress(args, len(requests)) as bar:
            outcomes, duration_s = await send_all(
                clients, target, requests, _arrivals(args, requests), args.max_concurrency, bar.update
            )
    _report_errors(outcomes)
    return {**_header(args, target, len(requests)), **summarise(outcomes, duration_s, options)}


def _arrivals(args: argparse.Namespace, requests: Sequence[ReadyRequest]) -> list[float]:
    recorded = [r.arrival_s for r in requests if r.arrival_s is not None]
    if args.self_timed is not False and len(recorded) == len(requests):
        return recorded
    return arrival_times(len(requests), args.request_rate, args.burstiness, random.Random(args.seed))


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


def _progress(args: argparse.Namespace, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="req", disable=args.disable_tqdm)


def _require_success(outcome: Outcome) -> None:
    if outcome.error is not None:
        raise MoEServeError(f"a warm-up request failed: {outcome.error}")


def _report_errors(outcomes: Sequence[Outcome]) -> None:
    for error, count in Counter(o.error for o in outcomes if o.error is not None).most_common(5):
        print(f"{count} failed: {error}", file=sys.stderr)


def _save(args: argparse.Namespace, result: dict[str, Any]) -> None:
    concurrency = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    model = Path(result["model_id"]).name
    default = f"{args.label or args.backend}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}.json"
    args.result_dir.mkdir(parents=True, exist_ok=True)
    path = args.result_dir / (args.result_filename or default)
    write_text(path, json.dumps(result if args.save_detailed else without_details(result)))
