"""Batches: each request is answered exactly once, whatever the input holds and whenever the process ends."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_serve.batches import runner
from moe_serve.batches.answers import AnswerFile, sort_answers
from moe_serve.batches.order import in_order
from moe_serve.batches.runner import Progress, run_batch
from moe_serve.batches.tasks import read_tasks
from moe_serve.cli import main
from moe_serve.errors import BatchStoppedError, ConfigError
from moe_serve_base.whole_files import OutputError
from tests.patience import PATIENCE_S

URL = "/v1/completions"


def line(custom_id: str, prompt: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"prompt": prompt, "max_tokens": 2}} | fields


def write(path: Path, *lines: object) -> Path:
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def echo(request: httpx.Request) -> httpx.Response:
    prompt = json.loads(request.content)["prompt"]
    return httpx.Response(200, json={"text": prompt, "usage": {"completion_tokens": 2}})


def run(source: Path, target: Path, answer: Callable[[httpx.Request], httpx.Response] = echo) -> Progress:
    async def work() -> Progress:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await run_batch(source, tasks, answers, client, 4, lambda progress: None)

    tasks = read_tasks(source)
    with AnswerFile(target, tasks) as answers:
        return asyncio.run(work())


def test_every_id_is_answered_once(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(line(f"id-{i}", f"prompt {i}") for i in range(50)))
    progress = run(source, tmp_path / "out.jsonl")
    assert (progress.total, progress.done, progress.errors, progress.tokens) == (50, 50, 0, 100)
    found = {row["custom_id"]: row["response"]["body"]["text"] for row in rows(tmp_path / "out.jsonl")}
    assert found == {f"id-{i}": f"prompt {i}" for i in range(50)}
    assert len(rows(tmp_path / "out.jsonl")) == 50
    assert run(source, tmp_path / "out.jsonl", pytest.fail).done == 50  # type: ignore[arg-type]  # nothing is asked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not a JSON object"),
        ({"method": "POST"}, "custom_id must be a string"),
        (line("b", method="GET"), "method must be POST"),
        (line("b", url="/v1/embeddings"), "url must be one of /v1/chat/completions"),
        (line("b", body=[]), "body must be a JSON object"),
        (line("b", body={"prompt": "x", "stream": True}), "body.stream"),
        (line("b", body={"input": "x", "background": True}), "body.background"),
    ],
)
def test_a_bad_line_is_answered_and_the_others_run(text: object, words: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("a"), text, "", line("c"))
    progress = run(source, tmp_path / "out.jsonl")
    assert (progress.done, progress.errors) == (3, 1)
    bad = next(row for row in rows(tmp_path / "out.jsonl") if row["error"])
    assert words in bad["error"]["message"]
    assert bad["response"] is None
    assert run(source, tmp_path / "out.jsonl").done == 3


def test_ids_are_unique(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("a"), line("b"), line("a"))
    with pytest.raises(ConfigError, match="line 3 has the custom_id 'a' of line 1"):
        read_tasks(source)


def test_an_answer_that_was_cut_off_is_asked_for_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(line(f"{i}") for i in range(4)))
    run(source, tmp_path / "out.jsonl")
    whole = (tmp_path / "out.jsonl").read_bytes()
    for length in range(0, len(whole), 17):
        (tmp_path / "out.jsonl").write_bytes(whole[:length])
        run(source, tmp_path / "out.jsonl")
        assert sorted(row["custom_id"] for row in rows(tmp_path / "out.jsonl")) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("text", ["x\n", '{"id": "batch_req_1", "custom_id": "other"}\n', '{"id": "batch_req_1"}\n'])
def test_the_output_of_another_batch_is_left_alone(text: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("a"))
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="line 1"):
        run(source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == text


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes half of the third line and then nothing."""
    source = write(tmp_path / "in.jsonl", *(line(f"{i}") for i in range(6)))
    tasks = read_tasks(source)
    with AnswerFile(tmp_path / "out.jsonl", tasks) as answers:
        answers.add(tasks[0], {})
        answers.add(tasks[1], {})
        real = answers._file

        class Full:
            room = 20

            def write(self, data: memoryview) -> int:
                taken = min(self.room, len(data))
                self.room -= taken
                if not taken:
                    raise OSError(28, "No space left on device")
                return real.write(data[:taken])

            def truncate(self, size: int) -> int:
                return real.truncate(size)

        monkeypatch.setattr(answers, "_file", Full())
        with pytest.raises(OutputError, match="No space left"):
            answers.add(tasks[2], {})
        monkeypatch.setattr(answers, "_file", real)
    assert [row["custom_id"] for row in rows(tmp_path / "out.jsonl")] == ["0", "1"]
    assert run(source, tmp_path / "out.jsonl").done == 6


def test_an_overloaded_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FIRST_WAIT_S", 0.001)
    source = write(tmp_path / "in.jsonl", *(line(f"{i}") for i in range(8)))
    dice = random.Random(0)

    def moody(request: httpx.Request) -> httpx.Response:
        mood = dice.random()
        if mood < 0.3:
            return httpx.Response(503, headers={"retry-after": "0"})
        if mood < 0.5:
            raise httpx.ConnectError("refused")
        return echo(request)

    assert run(source, tmp_path / "out.jsonl", moody).errors == 0


def test_a_server_that_is_gone_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(runner, "GONE_AFTER_S", 0.05)
    source = write(tmp_path / "in.jsonl", line("a"))
    with pytest.raises(BatchStoppedError, match="status 503"):
        run(source, tmp_path / "out.jsonl", lambda request: httpx.Response(503))
    assert run(source, tmp_path / "out.jsonl").done == 1


def test_an_error_of_one_request_is_its_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("a"))
    progress = run(source, tmp_path / "out.jsonl", lambda request: httpx.Response(400, json={"error": {"code": 400}}))
    assert progress.errors == 1
    assert rows(tmp_path / "out.jsonl")[0]["response"]["status_code"] == 400


def test_alike_prompts_run_together_and_much_work_first(tmp_path: Path) -> None:
    system = "You are a helpful assistant who answers in one word, always, and never explains. "
    lines = [
        line("short"),
        line("one", system + "1"),
        line("long", body={"prompt": "x", "max_tokens": 9000}),
        line("two", system + "2"),
    ]
    tasks = read_tasks(write(tmp_path / "in.jsonl", *lines))
    assert [task.custom_id for task in in_order(tasks)] == ["long", "one", "two", "short"]


def test_the_answers_can_be_put_into_the_order_of_the_input(tmp_path: Path) -> None:
    lengths = random.Random(1).sample(range(1, 100), 20)
    source = write(tmp_path / "in.jsonl", *(line(f"{i}", "x" * n) for i, n in enumerate(lengths)))
    run(source, tmp_path / "out.jsonl")
    sort_answers(tmp_path / "out.jsonl", read_tasks(source))
    assert [row["custom_id"] for row in rows(tmp_path / "out.jsonl")] == [str(i) for i in range(20)]


@pytest.mark.slow
def test_a_real_model_answers_what_the_server_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4, "temperature": 0}
    lines = (
        line("a"),
        line("b", url="/v1/chat/completions", body=chat),
        line("c", url="/v1/responses", body={"input": "Hello!", "max_output_tokens": 4}),
        line("d", body={"prompt": 5.5}),
    )
    source, target = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    assert main(["batch", str(source), "-o", str(target), "--keep-order"]) == 1
    found = rows(target)
    assert [row["response"]["status_code"] for row in found] == [200, 200, 200, 400]
    assert found[1]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert "4 of 4 answered, 1 with errors" in capsys.readouterr().err
    assert main(["batch", str(source), "-o", str(target)]) == 0


@pytest.mark.slow
def test_a_run_that_is_killed_twice_goes_on(tmp_path: Path) -> None:
    """kill -9 in the middle; the third run finishes. Every id is there once, with the answer of a run in one piece."""
    lines = [line(f"{i}", body={"prompt": f"{i}", "max_tokens": 16, "temperature": 0}) for i in range(120)]
    source, target = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "moe_serve", "batch", str(source), "-o", str(target), "--max-num-seqs", "8"]
    for least in (10, 40):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        _wait_until(lambda least=least: target.exists() and target.read_bytes().count(b"\n") >= least, process)  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(rows_whole(target)) < 120
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert sorted(int(row["custom_id"]) for row in rows(target)) == list(range(120))
    assert main([*command[3:6], str(tmp_path / "again.jsonl")]) == 0
    text = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows(target)}
    again = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows(tmp_path / "again.jsonl")}
    assert text == again


def rows_whole(path: Path) -> list[bytes]:
    return [text for text in path.read_bytes().splitlines(keepends=True) if text.endswith(b"\n")]


def _wait_until(is_true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10 * PATIENCE_S
    while not is_true():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)
