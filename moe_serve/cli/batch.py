"""`moe-serve batch INPUT -o OUTPUT`: answers a file of requests, in OpenAI's batch format."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_serve.cli import preflight
from moe_serve.cli.flags import OF_SERVER, add_config_flags, config_from_args, default_model
from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.config.settings import refuse_no_effect
from moe_serve.errors import BatchStoppedError
from moe_serve_base.whole_files import OutputError

if TYPE_CHECKING:
    import httpx

    from moe_serve.batches.runner import Progress

HELP = "Answer a file of requests in OpenAI's batch format, without a server; a run that was cut off goes on."
USAGE = "INPUT -o OUTPUT [flags]"
EXAMPLES = (
    "moe-serve batch requests.jsonl -o answers.jsonl --model Qwen/Qwen3-30B-A3B",
    "moe-serve batch requests.jsonl -o answers.jsonl --url http://127.0.0.1:8000",
)
SKIP = (*OF_SERVER, "model")
AT_ONCE_PER_PLACE = 2
"""Requests in flight for each of --max-num-seqs: the next ones wait ready while answers are written."""
AT_ONCE_ELSEWHERE = 256
TERMINAL_S, LOG_S = 0.5, 30.0
"""Between two reports of progress."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("input", metavar="INPUT", type=Path, help="JSON lines: custom_id, method, url and body.")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True, help="Answers, a line each. Goes on if it exists."
    )
    parser.add_argument(
        "--model", metavar="MODEL", default=default_model(), help="As for serve. Default: the demo model."
    )
    parser.add_argument("--url", metavar="URL", help="Ask this running server instead of loading a model.")
    parser.add_argument("--served-model-name", metavar="TEXT", help="The model's name in the requests, as for serve.")
    parser.add_argument("--keep-order", action="store_true", help="Sort the answers as the input, once all are there.")
    add_config_flags(parser, EngineConfig, skip=SKIP)


def run(args: argparse.Namespace) -> int:
    """Status 1 if any request of the file failed."""
    from moe_serve.batches.answers import AnswerFile, sort_answers
    from moe_serve.batches.runner import run_batch
    from moe_serve.batches.tasks import read_tasks

    config = config_from_args(args, EngineConfig)
    tasks = read_tasks(args.input)
    shown = Shown()

    async def work() -> Progress:
        async with _client(args, config) as (client, num_at_once):
            return await run_batch(args.input, tasks, answers, client, num_at_once, shown)

    with AnswerFile(args.output, tasks) as answers:
        try:
            if len(answers.answered) < len(tasks):
                shown.finish(asyncio.run(work()))
        except (OutputError, BatchStoppedError) as error:
            done = f"{len(answers.answered)} of {len(tasks)} requests are answered"
            raise BatchStoppedError(f"{error}; {done}: run the same command again to go on") from error
    if args.keep_order:
        sort_answers(args.output, tasks)
    return int(shown.num_errors > 0)


@asynccontextmanager
async def _client(args: argparse.Namespace, config: EngineConfig) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """A client of the server at --url, or of an application in this process; how many requests it may have."""
    import httpx

    if args.url is not None:
        key = os.environ.get("MOE_SERVE_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=AT_ONCE_ELSEWHERE)
        async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=None, limits=limits) as client:
            yield client, AT_ONCE_ELSEWHERE
        return
    refuse_no_effect(config)
    config = preflight.check_engine(config)
    preflight.say_importing()
    from moe_serve.server.run import app_without_port

    server = ServerConfig.of(served_model_name=args.served_model_name, disable_log_stats=True, dashboard=False)
    app = app_without_port(server, config)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            yield client, min(AT_ONCE_PER_PLACE * config.max_num_seqs, max(1, config.queue.max_num_queued_reqs))


class Shown:
    """Progress on stderr: one line that changes on a terminal, a line every half minute in a log."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._started_s = self._told_s = time.monotonic()
        self._done_before: int | None = None
        self.num_errors = 0

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if self._done_before is None:
            self._done_before = progress.done
        if now_s - self._told_s >= (TERMINAL_S if self._is_terminal else LOG_S):
            self._told_s = now_s
            self._tell(self.line(progress, now_s - self._started_s), end="\r" if self._is_terminal else "\n")

    def finish(self, progress: Progress) -> None:
        """The last line."""
        self.num_errors = progress.errors
        self._tell(self.line(progress, time.monotonic() - self._started_s), end="\n")

    def line(self, progress: Progress, seconds: float) -> str:
        """Such as `120 of 2000 answered, 3 with errors, 412 tokens/s, 5 min left`."""
        done = progress.done - (self._done_before or 0)
        parts = [f"{progress.done} of {progress.total} answered"]
        if progress.errors:
            parts.append(f"{progress.errors} with errors")
        parts.append(f"{progress.tokens / max(seconds, 1e-9):.0f} tokens/s")
        if done > 0 and progress.done < progress.total:
            parts.append(f"{_duration(seconds / done * (progress.total - progress.done))} left")
        return ", ".join(parts)

    def _tell(self, line: str, end: str) -> None:
        clear = "\033[K" if self._is_terminal else ""
        print(line + clear, end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
