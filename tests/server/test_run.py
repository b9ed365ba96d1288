"""`moe-serve serve` as a process of its own, with the demo model: its beginning, its signals and its end."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.server.serve_process import KEY, LONG, Reader, Serve, serving


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    with serving(tmp_path) as make:
        yield make


def test_a_life_from_loading_to_drained(start: Callable[..., Serve]) -> None:
    server = start("--shutdown-timeout", "60", "--log-format", "json", env={"MOE_SERVE_API_KEY": "sk-1"})
    seen: list[str] = []

    def is_ready() -> bool:
        seen.append(server.health())
        return seen[-1] == "ready"

    server.wait_until(is_ready)
    assert set(seen) == {"", "loading", "ready"}

    url = f"{server.url}/v1/completions"
    assert httpx.post(url, json={"prompt": "Once upon"}, timeout=PATIENCE_S).status_code == 401
    reader = Reader(server.url, {**LONG, "max_tokens": 300})
    server.wait_until(lambda: len(reader.events) > 3)
    server.signal(signal.SIGTERM)
    server.wait_until(lambda: server.health() == "draining")
    refused = httpx.post(url, json={"prompt": "x"}, headers=KEY, timeout=PATIENCE_S)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert httpx.get(f"{server.url}/live", timeout=PATIENCE_S).status_code == 200
    reader.join()
    assert reader.events[-1] == "[DONE]"
    assert json.loads(reader.events[-2])["choices"][0]["finish_reason"] == "length"
    assert server.end() == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert [line["status"] for line in lines if line["message"] == "request"] == [401, 503, 200]
    assert not [word for word in ("sk-1", "Once", "Traceback") if word in server.log]


@pytest.fixture
def hangups_count() -> Iterator[None]:
    """What starts under nohup ignores them, and so do its children."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_hangup_drains(start: Callable[..., Serve], hangups_count: None) -> None:
    server = start()
    server.wait_until(lambda: server.health() == "ready")
    server.signal(signal.SIGHUP)
    assert server.end() == 0
    assert "SIGHUP: 0 running requests" in server.log


@pytest.mark.slow
def test_who_does_not_finish_in_time_is_told(start: Callable[..., Serve]) -> None:
    server = start("--shutdown-timeout", "0.3")
    server.wait_until(lambda: server.health() == "ready")
    reader = Reader(server.url)
    server.wait_until(lambda: len(reader.events) > 3)
    server.signal(signal.SIGINT)
    assert server.end() == 0
    reader.join()
    assert "shutting down" in json.loads(reader.events[-2])["error"]["message"]
    assert reader.events[-1] == "[DONE]"


@pytest.mark.slow
def test_killed_and_started_again_on_the_same_port_then_ended_on_the_spot(start: Callable[..., Serve]) -> None:
    first = start()
    first.wait_until(lambda: first.health() == "ready")
    reader = Reader(first.url)
    first.wait_until(lambda: len(reader.events) > 3)
    first.signal(signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    reader.join()
    assert reader.broke_off
    second = start("--shutdown-timeout", f"{PATIENCE_S:g}", port=first.port)
    second.wait_until(lambda: second.health() == "ready")
    reader = Reader(second.url)
    second.wait_until(lambda: len(reader.events) > 3)
    second.signal(signal.SIGTERM)
    second.wait_until(lambda: second.health() == "draining")
    start_s = time.monotonic()
    second.signal(signal.SIGTERM)
    assert second.end() == 128 + signal.SIGTERM
    assert time.monotonic() - start_s < PATIENCE_S / 2, "it waited for the request"
    reader.join()
    assert reader.broke_off


def test_a_model_that_cannot_be_loaded_ends_the_server(start: Callable[..., Serve], tmp_path: Path) -> None:
    server = start(str(tmp_path / "nothing"))
    assert server.end() == 2
    assert "moe-serve: error:" in server.log
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_a_signal_while_loading_ends_it(start: Callable[..., Serve]) -> None:
    server = start()
    server.wait_until(lambda: server.health() == "loading")
    server.signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_taken_port_is_found_before_the_model_is_loaded(start: Callable[..., Serve]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = start(port=taken.getsockname()[1])
        assert server.end() == 2
    assert "choose another with --port" in server.log
    assert "loading" not in server.log
