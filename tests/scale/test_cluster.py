"""A real Ray cluster of one node with two demo engines: answers, a killed engine, the end. Needs the extra `ray`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.patience import PATIENCE_S

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

PORT = 18431
URL = f"http://127.0.0.1:{PORT}"
COMMAND = (
    *("moe_serve", "scale", "--replicas", "2", "--cpus-per-replica", "0.5", "--kv-cache-mib", "64"),
    *("--num-threads", "1", "--port", str(PORT)),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"RAY_raylet_start_wait_time_s": "300"}
    with (
        Path(tmp_path_factory.mktemp("ray") / "log").open("wb") as log,
        subprocess.Popen([sys.executable, "-m", *COMMAND], stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            wait_until_served(process)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
    assert engines() == []


def wait_until_served(process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        assert process.poll() is None
        if len(replicas()) == 2:
            return
        time.sleep(0.2)
    raise AssertionError("the engines did not start")


def replicas() -> set[str]:
    """Those whose metrics the door tells."""
    try:
        return set(re.findall('replica="([^"]+)"', httpx.get(f"{URL}/metrics", timeout=10).text))
    except httpx.TransportError:
        return set()


def engines() -> list[psutil.Process]:
    """Processes of replicas; Ray names them."""
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if "ray::ServeReplica:moe-serve:engine" in "".join(p.info["cmdline"] or [])
    ]


def complete(number: int, max_tokens: int, **more: object) -> httpx.Response:
    body = {
        "prompt": f"Story {number}: the cat",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }
    return httpx.post(f"{URL}/v1/completions", json=body, timeout=PATIENCE_S)


def test_answers_equal_whichever_engine_computes_them(cluster: subprocess.Popen[bytes]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(1, 16).json()["choices"][0]["text"], range(8)))
    assert len(set(answers)) == 1


def test_a_killed_engine_costs_no_request_that_had_no_answer_yet(cluster: subprocess.Popen[bytes]) -> None:
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(complete, number, 300) for number in range(8)]
        time.sleep(0.5)
        engines()[0].kill()
        answers = [done.result() for done in running]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [300] * 8
