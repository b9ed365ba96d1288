"""Tasks: the lines of a batch's input file, checked before any of them runs.

A line is {"custom_id", "method": "POST", "url", "body"}, as OpenAI's Batch API has it. Bodies stay in the file until
their turn comes; a task remembers where.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.errors import ConfigError, one_line

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
KEY_CHARS = 4096
"""Of a prompt that are compared with those of others."""
PROMPTS = ("messages", "prompt", "input")
"""Fields that hold a prompt, by endpoint."""
LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
USUAL_LENGTH = 256
"""Tokens of an answer whose body names no limit."""
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One line of the input."""

    number: int
    """Of the line, from 1."""
    offset: int
    """Bytes before the line."""
    custom_id: str | None
    url: str = ""
    key: str = ""
    """The beginning of the prompt, alike for alike prompts."""
    max_tokens: int = USUAL_LENGTH
    problem: str | None = None
    """Why the line cannot be run."""

    @property
    def id(self) -> str:
        """The answer's own id."""
        return f"batch_req_{self.number}"


def read_tasks(path: Path) -> list[Task]:
    """All lines but the empty ones. A line that cannot be run is a Task with a problem.

    ConfigError: the file cannot be read, or two lines have one custom_id.
    """
    try:
        with path.open("rb") as stream:
            tasks = list(_tasks(stream))
    except OSError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    if not tasks:
        raise ConfigError(f"{path} holds no requests")
    lines: dict[str, int] = {}
    for task in tasks:
        if task.custom_id is not None and lines.setdefault(task.custom_id, task.number) != task.number:
            first = lines[task.custom_id]
            raise ConfigError(f"{path}: line {task.number} has the custom_id {task.custom_id!r} of line {first}")
    return tasks


def body_at(stream: Any, task: Task) -> Any:
    """The body of a task without a problem, from its line in the open file."""
    stream.seek(task.offset)
    return json.loads(stream.readline())["body"]


def _tasks(stream: Any) -> Iterator[Task]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _task(number, offset, line)
        offset += len(line)


def _task(number: int, offset: int, line: bytes) -> Task:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Task(number, offset, None, problem=f"line {number} is not JSON: {one_line(error)}")
    if not isinstance(fields, dict):
        return Task(number, offset, None, problem=f"line {number} is not a JSON object")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Task(number, offset, None, problem=f"line {number}: custom_id must be a string that is not empty")
    problem = _problem(fields)
    if problem is not None:
        return Task(number, offset, custom_id, problem=f"line {number}: {problem}")
    body = fields["body"]
    return Task(number, offset, custom_id, fields["url"], _key(body), _max_tokens(body))


def _problem(fields: Fields) -> str | None:
    url, body = fields.get("url"), fields.get("body")
    if fields.get("method", "POST") != "POST":
        return "method must be POST"
    if url not in URLS:
        return f"url must be one of {', '.join(URLS)}"
    if not isinstance(body, dict):
        return "body must be a JSON object"
    if body.get("stream"):
        return "body.stream: answers of a batch are not streamed; remove it"
    if body.get("background"):
        return "body.background: a batch is in the background already; remove it"
    return None


def _key(body: Fields) -> str:
    prompt = next((body[name] for name in PROMPTS if body.get(name)), "")
    instructions = body.get("instructions") or ""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return f"{instructions}{text}"[:KEY_CHARS]


def _max_tokens(body: Fields) -> int:
    found = next((body[name] for name in LENGTHS if body.get(name) is not None), USUAL_LENGTH)
    return found if isinstance(found, int) and found > 0 else USUAL_LENGTH
