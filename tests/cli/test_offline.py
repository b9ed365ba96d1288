"""`generate` and `chat`, with a fake in place of the model; `chat --url` against the stub server."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from moe_serve.cli import main
from moe_serve.cli.flags import default_model
from moe_serve.errors import ContextTooLongError
from moe_serve.scheduling.sequence import SampleOutput, SamplingParams


def _output(text: str) -> SampleOutput:
    return SampleOutput("r", 0, text, (1,), (), None, None, 1, 0, 1)


@dataclass
class FakeLLM:
    """Answers with the prompt's words in reverse; a conversation is prompted by its messages' texts."""

    settings: dict[str, Any]
    calls: list[tuple[str, SamplingParams]] = field(default_factory=list)
    last: ClassVar[FakeLLM]

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[SampleOutput]:
        self.calls.append((prompt, params))
        if "long" in prompt:
            raise ContextTooLongError("prompt", "the prompt is too long")
        for word in reversed(prompt.split()):
            yield _output(word + " ")

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        return " ".join(f"{m['role'][0]}:{m['content'].strip()}" for m in messages)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    def load(**settings: Any) -> FakeLLM:
        FakeLLM.last = FakeLLM(settings)
        return FakeLLM.last

    module = ModuleType("moe_serve.llm")
    module.LLM = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moe_serve.llm", module)
    return FakeLLM


def _type(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_generate_streams_the_completion(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-tokens", "9", "--max-num-seqs", "3", "--generation-config", "vllm"]
    assert main(["generate", "--prompt", "a b c", *flags]) == 0
    assert capsys.readouterr().out == "c b a \n"
    assert fake.last.calls == [("a b c", SamplingParams(max_tokens=9))]
    assert fake.last.settings["max_num_seqs"] == 3
    assert fake.last.settings["model"] == default_model()


def test_generate_reads_standard_input(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _type(monkeypatch, "x y")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    assert main(["generate", str(tmp_path), "--seed", "5"]) == 0
    assert capsys.readouterr().out == "y x \n"
    assert (fake.last.settings["model"], fake.last.settings["seed"]) == (str(tmp_path), 5)


def test_generate_reports_an_impossible_prompt(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "too long"]) == 2
    assert capsys.readouterr().err == "moe-serve: error: the prompt is too long\n"


def test_chat_remembers_resets_and_exits(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _type(monkeypatch, "one\n\ntwo\n/reset\nthree\n/exit\nnever\n")
    assert main(["chat", "--system", "kind", "--temperature", "0"]) == 0
    assert [prompt for prompt, _ in fake.last.calls] == [
        "s:kind u:one",
        "s:kind u:one a:u:one s:kind u:two",
        "s:kind u:three",
    ]
    assert fake.last.calls[0][1].is_greedy
    assert capsys.readouterr().out.splitlines()[0] == "u:one s:kind "


def test_a_failed_answer_is_forgotten_and_the_chat_goes_on(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _type(monkeypatch, "long\nshort\n")
    assert main(["chat"]) == 1
    assert [prompt for prompt, _ in fake.last.calls] == ["u:long", "u:short"]
    assert "the prompt is too long" in capsys.readouterr().err


def test_chat_with_a_server(stub: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _type(monkeypatch, "hello\nfail\nagain\n")
    assert main(["chat", "--url", stub.url + "/v1", "--max-tokens", "3"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == ["t0 t1 t2 ", "", "t0 t1 t2 "]
    assert "the server answered 503: the queue is full" in err
    assert [m["role"] for m in stub.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert stub.bodies[-1]["model"] == "stub-model"
    assert "temperature" not in stub.bodies[-1], "what is not asked for is the server's to choose"


@pytest.mark.parametrize("variable", ["MOE_SERVE_API_KEY", "OPENAI_API_KEY"])
def test_chat_sends_a_key(stub: Any, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in ("MOE_SERVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    _type(monkeypatch, "hello\n")
    assert main(["chat", "--url", stub.url, "--max-tokens", "3"]) == 0
    assert b"authorization" not in stub.headers
    monkeypatch.setenv(variable, "from-the-variable")
    for flags, key in (([], b"from-the-variable"), (["--api-key", "from-the-flag"], b"from-the-flag")):
        _type(monkeypatch, "hello\n")
        assert main(["chat", "--url", stub.url, "--max-tokens", "3", *flags]) == 0
        assert stub.headers[b"authorization"] == b"Bearer " + key


def test_chat_without_a_server_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _type(monkeypatch, "anyone?\n")
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("moe-serve: error: cannot talk to the server")


def test_ctrl_c_ends_with_the_shells_status(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: FakeLLM, prompt: str, params: SamplingParams) -> Iterator[SampleOutput]:
        yield _output("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeLLM, "stream", interrupted)
    assert main(["generate", "--prompt", "x"]) == 130
