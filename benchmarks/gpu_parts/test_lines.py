"""A plugin of pytest (`-p gpu_parts.test_lines`): each test that fails as a line, and the numbers of all now and then.

So a run that is cut short tells how far it came. With pytest-xdist only the controlling process writes.
"""

from __future__ import annotations

from collections import Counter

import pytest
from gpu_parts.lines import Lines

EVERY = 20
"""Tests between two lines of numbers."""


class Reporter:
    """Counts outcomes of one run."""

    def __init__(self) -> None:
        self._lines = Lines("tests")
        self._outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's set-up, call or end."""
        if report.failed:
            self._lines.add(test=report.nodeid, error=str(report.longrepr)[-1500:])
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome] += 1
            if self._outcomes.total() % EVERY == 0:
                self._lines.add(**self._outcomes)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._lines.add(test=report.nodeid, error=str(report.longrepr)[-1500:])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """All of them."""
        self._lines.add(status=int(exitstatus), finished=True, **self._outcomes)


def pytest_configure(config: pytest.Config) -> None:
    """Not in xdist's workers; the environment says of them also where another run's worker started this one."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter())
