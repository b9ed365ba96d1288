"""AnswerFile: a batch's output, one line per answered task, appended as answers come. A run that was killed goes on.

Each line holds its task's number and custom_id. A last line without an end, which a killed process leaves, is cut off;
its task runs again. So each task has one line in the end.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moe_serve.batches.tasks import Task
from moe_serve.errors import ConfigError
from moe_serve_base.whole_files import OutputError, whole_file


class AnswerFile:
    """The output of `tasks`, open for appending. ConfigError: the file is that of another batch."""

    def __init__(self, path: Path, tasks: Sequence[Task]) -> None:
        self._path = path
        self._ids = {task.id: task.custom_id for task in tasks}
        self.answered: set[str] = set()
        """Ids of the tasks that have their line."""
        try:
            self._end = self._read()
            self._file = path.open("ab", buffering=0)
            self._file.truncate(self._end)
        except OSError as error:
            raise OutputError(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, task: Task, answer: Mapping[str, Any]) -> None:
        """Append one line. OutputError where it cannot be written: then the file ends with the line before."""
        line = json.dumps({"id": task.id, "custom_id": task.custom_id, **answer}, ensure_ascii=False).encode() + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._end)
            raise OutputError(self._path, error) from error
        self._end += len(line)
        self.answered.add(task.id)

    def sync(self) -> None:
        """Have the system put everything on the disk."""
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Bytes up to the end of the last whole line."""
        end = 0
        with self._path.open("rb") if self._path.exists() else io.BytesIO() as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                self._note(number, line)
                end += len(line)
        return end

    def _note(self, number: int, line: bytes) -> None:
        try:
            fields = json.loads(line)
            found = fields["id"], fields["custom_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(number, "is no answer of a batch") from error
        if found[0] not in self._ids or self._ids[found[0]] != found[1]:
            raise self._foreign(number, f"answers {found[1]!r}, which is not in the input at that line")
        if found[0] in self.answered:
            raise self._foreign(number, f"answers {found[1]!r} a second time")
        self.answered.add(found[0])

    def _foreign(self, number: int, what: str) -> ConfigError:
        return ConfigError(f"{self._path}: line {number} {what}; give another output file")


def sort_answers(path: Path, tasks: Iterable[Task]) -> None:
    """Put the lines into the order of the input, in a new file that replaces the old one."""
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as source:
        offset = 0
        for line in source:
            places[json.loads(line)["id"]] = (offset, len(line))
            offset += len(line)
        with whole_file(path) as partial, partial.open("wb") as target:
            for task in tasks:
                offset, length = places[task.id]
                source.seek(offset)
                target.write(source.read(length))
