"""Loader: what comes of loading a checkpoint folder, asked of a child process that may die, hang or swell."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0
"""For one folder; typical: 0.2."""
START_S = 300.0
"""For the child's imports and its first folder."""
CASES_PER_CHILD = 300
LOG_BYTES = 4000
MOST_EXAMPLES = 100
"""In one run: each takes a fraction of a second."""


class LoadingFault(AssertionError):
    """A folder did what none may do."""


@dataclass
class Loader:
    """Keeps one child, and starts another after a death and from time to time."""

    _child: subprocess.Popen[bytes] | None = None
    _log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    _num_cases: int = 0

    def refusal(self, folder: Path) -> str | None:
        """Why `folder` is refused, in one line; None where it loads and gives finite logits. LoadingFault."""
        found = self._ask(folder)
        if "crashed" in found:
            raise LoadingFault(found["crashed"])
        if "refused" not in found:
            if not found["finite"]:
                raise LoadingFault("scores are not finite, are too few, or are of tokens outside the vocabulary")
            return None
        message = str(found["refused"])
        if not message.strip() or "\n" in message:
            raise LoadingFault(f"not one line: {message!r}")
        return message

    def _ask(self, folder: Path) -> dict[str, Any]:
        if self._child is None or self._num_cases == CASES_PER_CHILD:
            self._end_child()
            self._child, self._num_cases = self._start(), 0
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{folder}\n".encode())
        self._child.stdin.flush()
        self._num_cases += 1
        limit_s = START_S if self._num_cases == 1 else LIMIT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            line = self._child.stdout.readline() if selector.select(limit_s) else None
        if not line:
            self._end_child()
            what = f"no answer in {limit_s:g} s" if line is None else "the process died"
            raise LoadingFault(f"{what}:\n{self._end_of_log()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        self._log.truncate(0)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.loading_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
        )

    def _end_of_log(self) -> str:
        self._log.seek(0)
        return self._log.read()[-LOG_BYTES:].decode(errors="replace")

    def close(self) -> None:
        """End the child; the loader is of no use afterwards."""
        self._end_child()
        self._log.close()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def run_examples(
    generated: SearchStrategy[T],
    check: Callable[[T], object],
    seed: int,
    examples: int,
    phases: Sequence[Phase] = (Phase.generate,),
) -> int:
    """Generate and check at most so many, MOST_EXAMPLES at once; returns how many."""
    count = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=min(examples, MOST_EXAMPLES),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    @given(made=generated)
    def example(made: T) -> None:
        nonlocal count
        count += 1
        check(made)

    example()
    return count
