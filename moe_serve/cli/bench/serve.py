"""`moe-serve bench serve`: load on any OpenAI-compatible server, with the flags and results of vLLM's.

stdout: tables, then one line of JSON, always the last. Progress goes to stderr. The work is in moe_serve/loadtest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_serve.cli.table import table
from moe_serve.loadtest.datasets import plan_requests
from moe_serve.loadtest.flags import add_flags, dataset_options, summary_options
from moe_serve.loadtest.measure import measure
from moe_serve.loadtest.summary import SummaryOptions, sections, without_details
from moe_serve_base.whole_files import write_text

HELP = "Measure an OpenAI-compatible server under load."
USAGE = "[flags]"
EXAMPLES = (
    "moe-serve bench serve --num-prompts 200 --request-rate 4",
    "moe-serve bench serve --base-url http://HOST:8000 --backend openai-chat --max-concurrency 16",
)


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Status 1 if no request succeeded."""
    from tqdm import tqdm

    options = summary_options(args)
    plan = plan_requests(dataset_options(args))  # before the server is asked: a bad file should not wait for it
    result = asyncio.run(
        measure(args, plan, options, lambda total: tqdm(total=total, unit="req", disable=args.disable_tqdm))
    )
    for error, count in Counter(filter(None, result["errors"])).most_common(5):
        print(f"{count} failed: {error}", file=sys.stderr)
    print(_tables(result, options))
    if args.save_result:
        _save(args, result)
    print(json.dumps(without_details(result)))
    return 0 if result["completed"] else 1


def _tables(result: dict[str, Any], options: SummaryOptions) -> str:
    return "\n".join(f"{title}\n{table(rows, indent='  ')}" for title, rows in sections(result, options))


def _save(args: argparse.Namespace, result: dict[str, Any]) -> None:
    concurrency = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    model = Path(result["model_id"]).name
    default = f"{args.label or args.backend}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}.json"
    args.result_dir.mkdir(parents=True, exist_ok=True)
    path = args.result_dir / (args.result_filename or default)
    write_text(path, json.dumps(result if args.save_detailed else without_details(result)))
