"""`moe-serve serve --config FILE` and `--print-config`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from moe_serve.cli import main
from moe_serve.cli.flags import default_model
from moe_serve.config import EngineConfig, ParallelConfig, ServerConfig
from moe_serve.config.settings import settings_of


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the server was started with."""
    found: list[tuple[Any, ...]] = []
    run = ModuleType("moe_serve.server.run")
    run.serve = lambda *configs: found.append(configs)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moe_serve.server.run", run)
    return found


def test_a_file_sets_what_the_command_line_does_not(tmp_path: Path, started: list[tuple[Any, ...]]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"model: {default_model()}\nport: 0\nsupervisor: false\nmax-num-seqs: 3\nmax_model_len: 64\n"
        "shutdown_timeout: 2\nallowed-origins: [https://a.example]\nmoe-cache-mib: 7\n"
    )
    assert main(["serve", "--config", str(file), "--max-num-seqs", "5"]) == 0
    ((server, engine, parallel),) = started
    assert server == ServerConfig(
        port=0, supervisor=False, shutdown_timeout_s=2, allowed_origins=("https://a.example",)
    )
    assert engine == EngineConfig.of(model=default_model(), max_num_seqs=5, max_model_len=64, moe_cache_mib=7)
    assert parallel == ParallelConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 8000", "no setting 'prot'; did you mean port"),
        ("port: high", "--port takes int, got 'high'"),
        ("moe-cache-policy: best", "--moe-cache-policy: 'best' is not one of"),
        ("experts: {cache_mib: 3}", "'experts' is no flag"),
        ("- port", "must hold one setting a line"),
        ("port: [", "cannot read"),
        ("port: -1", "--port"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[tuple[Any, ...]], text: str, words: str
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(file) in error
    assert started == []


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", "/nowhere.yaml"]) == 2
    assert "--config: cannot read /nowhere.yaml" in capsys.readouterr().err


def test_what_is_printed_is_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[tuple[Any, ...]]
) -> None:
    flags = ["--port", "0", "--no-supervisor", "--moe-cache-mib", "9", "--api-key", "sk-hidden"]
    assert main(["serve", *flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "sk-hidden" not in printed
    names = {name.replace("-", "_") for name in yaml.safe_load(printed)}
    configs = (EngineConfig, ServerConfig, ParallelConfig)
    assert names == {setting.name for config in configs for setting in settings_of(config)} - {"api_key"}
    file = tmp_path / "serve.yaml"
    file.write_text(printed)
    assert main(["serve", "--config", str(file)]) == 0
    ((server, engine, _),) = started
    assert (server.port, server.supervisor, engine.experts.cache_mib) == (0, False, 9)
