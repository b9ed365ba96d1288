"""Running a batch: a bounded number of tasks in flight through an HTTP client, each answered once.

The client may speak to a server elsewhere, or to the application in this process. An overloaded server is asked again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from moe_serve.batches.answers import AnswerFile
from moe_serve.batches.order import in_order
from moe_serve.batches.tasks import Task, body_at
from moe_serve.errors import BatchStoppedError, one_line

OVERLOADED = (429, 503)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
GONE_AFTER_S = 300.0
"""A server that has answered nothing for this time is given up."""


@dataclass(slots=True)
class Progress:
    """How far a batch is."""

    total: int
    done: int = 0
    """Answered, earlier runs included."""
    errors: int = 0
    """Of this run."""
    tokens: int = 0
    """Generated in this run."""


Report = Callable[[Progress], None]


async def run_batch(
    source: Path,
    tasks: Sequence[Task],
    answers: AnswerFile,
    client: httpx.AsyncClient,
    num_at_once: int,
    report: Report,
) -> Progress:
    """Answer what `answers` lacks. `report` is told after each answer.

    OutputError: the disk is full. BatchStoppedError. Both leave whole lines, and the next run goes on from them.
    """
    left = in_order(task for task in tasks if task.id not in answers.answered)
    progress = Progress(len(tasks), len(answers.answered))
    report(progress)
    with source.open("rb") as stream:
        todo, asker = iter(left), _Asker(client)

        async def work() -> None:
            for task in todo:
                answer = await _answer(asker, task, stream)
                answers.add(task, answer)
                _count(progress, answer)
                report(progress)

        await _all(work() for _ in range(min(num_at_once, len(left))))
    answers.sync()
    return progress


async def _all(workers: Iterator[Any]) -> None:
    """Run them; the first error ends the others and is raised alone."""
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _count(progress: Progress, answer: dict[str, Any]) -> None:
    response = answer["response"]
    progress.done += 1
    if response is None or response["status_code"] != 200:
        progress.errors += 1
    else:
        usage = response["body"].get("usage") or {}
        progress.tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0


async def _answer(asker: _Asker, task: Task, stream: Any) -> dict[str, Any]:
    if task.problem is not None:
        return {"response": None, "error": {"code": "invalid_request", "message": task.problem}}
    response = await asker.ask(task.url, body_at(stream, task))
    try:
        body = response.json()
    except ValueError:
        body = response.text
    request_id = response.headers.get("x-request-id") or task.id
    return {"response": {"status_code": response.status_code, "request_id": request_id, "body": body}, "error": None}


class _Asker:
    """Asks a server that may be overloaded or away for a while."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._good_s = time.monotonic()
        """When the last answer came that was no refusal."""

    async def ask(self, url: str, body: Any) -> httpx.Response:
        """The answer. BatchStoppedError: for GONE_AFTER_S there was none to any task."""
        wait_s = FIRST_WAIT_S
        while True:
            trouble, asked_s = "", None
            try:
                response = await self._client.post(url, json=body)
                if response.status_code not in OVERLOADED:
                    self._good_s = time.monotonic()
                    return response
                trouble, asked_s = f"status {response.status_code}", _retry_after_s(response)
            except httpx.TransportError as error:
                trouble = one_line(error)
            if time.monotonic() - self._good_s > GONE_AFTER_S:
                raise BatchStoppedError(f"{self._client.base_url}: no answer for {GONE_AFTER_S:g} s ({trouble})")
            await asyncio.sleep(asked_s or wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_WAIT_S) if value.isdigit() else None
