"""The supervisor of `moe-serve serve`: deaths, orders and statuses."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from moe_serve.server.supervisor import MAX_DEATHS, WINDOW_S, Supervisor
from tests.patience import PATIENCE_S
from tests.server.serve_process import LONG, Reader, Serve, child_of, complete, serving


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    with serving(tmp_path) as make:
        yield make


def is_logged(server: Serve, text: str, times: int) -> bool:
    return server.log.count(text) == times


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_death_is_named_and_serving_goes_on(start: Callable[..., Serve], number: signal.Signals) -> None:
    server = start()
    server.wait_until(lambda: server.health() == "ready")
    before = complete(server).json()["choices"]
    first = child_of(server)
    os.kill(first, number)
    server.wait_until(lambda: child_of(server) not in (0, first) and server.health() == "ready")
    assert complete(server).json()["choices"] == before
    assert server.log.count(f"the serving process {first} died of {number.name}") == 1
    server.signal(signal.SIGTERM)
    assert server.end() == 0


@pytest.mark.slow
def test_the_parent_is_small_and_leaves_no_orphan(start: Callable[..., Serve]) -> None:
    server = start()
    server.wait_until(lambda: server.health() == "ready")
    child = child_of(server)
    assert "libtorch" in Path(f"/proc/{child}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    server.signal(signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    deadline = time.monotonic() + PATIENCE_S
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_to_both_processes_drains_once(start: Callable[..., Serve]) -> None:
    """As systemd and `timeout` do."""
    server = start("--shutdown-timeout", f"{PATIENCE_S:g}")
    server.wait_until(lambda: server.health() == "ready")
    reader = Reader(server.url, {**LONG, "max_tokens": 300})
    server.wait_until(lambda: len(reader.events) > 3)
    os.kill(child_of(server), signal.SIGTERM)
    server.wait_until(lambda: server.health() == "draining")
    server.signal(signal.SIGTERM)
    reader.join()
    assert reader.events[-1] == "[DONE]"
    assert server.end() == 0


@pytest.mark.slow
def test_too_many_deaths_end_it_by_their_signal(start: Callable[..., Serve]) -> None:
    server = start()
    deaths: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while server.process.poll() is None:
        assert time.monotonic() < deadline, server.log
        child = child_of(server)
        if child and child not in deaths and is_running(child):
            os.kill(child, signal.SIGSEGV)
            deaths.add(child)
        time.sleep(0.02)
    assert server.end() == -signal.SIGSEGV
    assert len(deaths) == MAX_DEATHS + 1
    assert "the server ends" in server.log


@pytest.mark.slow
def test_an_order_during_a_pause_ends_it(start: Callable[..., Serve]) -> None:
    server = start()
    for number in range(MAX_DEATHS):  # the last pause is 4 s
        server.wait_until(lambda: child_of(server))
        os.kill(child_of(server), signal.SIGABRT)
        server.wait_until(partial(is_logged, server, "died of SIGABRT", number + 1))
    assert child_of(server) == 0
    server.signal(signal.SIGTERM)
    assert server.end() == 0


@pytest.mark.slow
def test_without_a_supervisor_the_server_is_the_process(start: Callable[..., Serve]) -> None:
    server = start("--no-supervisor")
    server.wait_until(lambda: server.health() == "ready")
    assert "libtorch" in Path(f"/proc/{server.process.pid}/maps").read_text()
    server.signal(signal.SIGSEGV)
    assert server.end() == -signal.SIGSEGV


@pytest.mark.slow
def test_port_0_is_chosen_once(start: Callable[..., Serve]) -> None:
    server = start("--port", "0")
    server.wait_until(lambda: "dashboard and chat" in server.log)
    os.kill(child_of(server), signal.SIGKILL)
    server.wait_until(lambda: server.log.count("dashboard and chat") == 2)
    urls = [line.rpartition(" ")[2] for line in server.log.splitlines() if "dashboard and chat" in line]
    assert urls[0] == urls[1]
    assert not urls[0].endswith(":0/dashboard")


def test_pauses_grow_until_there_were_too_many() -> None:
    supervisor = Supervisor(lambda: 0.0)
    assert [supervisor.next_pause_s() for _ in range(MAX_DEATHS + 1)] == [0.25, 0.5, 1.0, 2.0, 4.0, None]


def test_old_deaths_are_forgotten() -> None:
    now = [0.0]
    supervisor = Supervisor(lambda: now[0])
    assert [supervisor.next_pause_s(), supervisor.next_pause_s()] == [0.25, 0.5]
    now[0] = WINDOW_S + 1
    assert supervisor.next_pause_s() == 0.25
