"""A limit of open files: fitted to, or refused in one line, never found out while accepting."""

from __future__ import annotations

import resource

import pytest

from moe_serve.errors import ConfigError
from moe_serve.server.transport.connections import raise_file_limit


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The hard limit that the machine has, for this test."""
    found = [0]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (found[0], found[0]))
    return found


@pytest.mark.parametrize(("files", "room"), [(128, 64), (400, 200), (1024, 768), (65536, 65280)])
def test_connections_leave_files_for_all_else(limit: list[int], files: int, room: int) -> None:
    limit[0] = files
    assert raise_file_limit() == room


def test_too_few_files_are_refused_at_once(limit: list[int]) -> None:
    limit[0] = 64
    with pytest.raises(ConfigError, match="ulimit -n"):
        raise_file_limit()
