"""`moe-serve launch`: agents are executables that record what they are given."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_serve.cli import main
from moe_serve.cli.agents import AGENTS, Served, environment_of
from moe_serve.config import ServerConfig
from moe_serve.server.transport.guard import guard
from tests.fuzz.harness import random_app, served

RECORD = """#!{python}
import json, os, sys
with open({file!r}, "w") as file:
    json.dump({{"environment": dict(os.environ), "arguments": sys.argv[1:]}}, file)
sys.exit(7)
"""


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Every agent is there, and what the one that ran was given."""
    file = tmp_path / "recorded.json"
    for name in AGENTS:
        program = tmp_path / name
        program.write_text(RECORD.format(python=sys.executable, file=str(file)))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("MOE_SERVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return lambda: json.loads(file.read_text())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the model `random`, with a context of 48 tokens and the key `k`."""
    app: Any = guard(random_app(), ServerConfig(), frozenset({"k"}))
    with served(app) as address:
        yield address


def test_claude(url: str, recorded: Callable[[], Any]) -> None:
    words = ["launch", "claude", "--url", f"{url}/v1/", "--api-key", "k", "--", "-p", "hi", "--verbose"]
    assert main(words) == 7
    environment = recorded()["environment"]
    assert recorded()["arguments"] == ["-p", "hi", "--verbose"]
    assert environment["ANTHROPIC_BASE_URL"] == url
    assert environment["ANTHROPIC_AUTH_TOKEN"] == "k"
    assert environment["ANTHROPIC_API_KEY"] == ""
    models = [value for name, value in environment.items() if name.startswith("ANTHROPIC_") and name.endswith("MODEL")]
    assert models == ["random"] * 4


def test_codex(url: str, recorded: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SERVE_API_KEY", "k")
    assert main(["launch", "codex", "--url", url, "--", "exec", "hi"]) == 7
    environment, arguments = recorded()["environment"], recorded()["arguments"]
    assert (environment["OPENAI_API_KEY"], environment["OPENAI_BASE_URL"]) == ("k", f"{url}/v1")
    assert arguments[-2:] == ["exec", "hi"]
    settings = dict(word.split("=", 1) for word in arguments[1:-2:2])
    assert set(arguments[:-2:2]) == {"-c"}
    assert json.loads(settings["model_providers.moe-serve.base_url"]) == f"{url}/v1"
    assert json.loads(settings["model_providers.moe-serve.wire_api"]) == "responses"
    assert (settings["model"], settings["model_context_window"]) == ('"random"', "48")


def test_opencode_and_aider(url: str, recorded: Callable[[], Any]) -> None:
    assert main(["launch", "opencode", "--url", url, "--api-key", "k"]) == 7
    config = json.loads(recorded()["environment"]["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == "moe-serve/random"
    assert config["provider"]["moe-serve"]["options"] == {"baseURL": f"{url}/v1", "apiKey": "k"}
    assert main(["launch", "aider", "--url", url, "--api-key", "k"]) == 7
    environment = recorded()["environment"]
    assert (environment["AIDER_MODEL"], environment["OPENAI_API_BASE"]) == ("openai/random", f"{url}/v1")


def test_what_is_printed_is_what_a_shell_sets(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the agent being installed."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert main(["launch", "opencode", "--url", url, "--api-key", "k", "--print-env"]) == 0
    printed = capsys.readouterr().out
    shell = subprocess.run(["sh", "-c", printed + "env -0"], capture_output=True, text=True, check=True, env={})
    found = dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if entry)
    expected = environment_of(AGENTS["opencode"], Served(url, "random", 48, "k"))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("claude --url http://127.0.0.1:9 --model x", "--model has no effect with --url"),
        ("claude --print-env", "--print-env needs --url"),
        ("claude", "claude is not installed here; `npm install -g @anthropic-ai/claude-code` installs it"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, complaint: str
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["launch", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


@pytest.mark.parametrize(
    ("address", "key", "complaint"), [("http://127.0.0.1:9", "k", "cannot talk to"), ("", "wrong", "answers 401")]
)
def test_a_server_that_does_not_answer(
    url: str, recorded: Callable[[], Any], capsys: pytest.CaptureFixture[str], address: str, key: str, complaint: str
) -> None:
    assert main(["launch", "claude", "--url", address or url, "--api-key", key]) == 1
    assert complaint in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(recorded: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "claude", "--model", "/nowhere"]) == 1
    assert "/nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_server_ends_with_the_agent(
    tmp_path: Path, recorded: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("kv-cache-mib: 16\nserved-model-name: mine\n")
    assert main(["launch", "claude", "--config", str(config)]) == 7
    environment = recorded()["environment"]
    assert environment["ANTHROPIC_MODEL"] == "mine"
    assert environment["ANTHROPIC_BASE_URL"] in capsys.readouterr().err
    port = int(environment["ANTHROPIC_BASE_URL"].rsplit(":", 1)[1])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
