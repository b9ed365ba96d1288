"""`moe-serve serve` hands all configs to the server; the server itself is tested elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from moe_serve.cli import main
from moe_serve.cli.flags import default_model
from moe_serve.config import EngineConfig, ParallelConfig, ServerConfig


def test_serve_passes_the_configs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[object, ...]] = []
    run = ModuleType("moe_serve.server.run")
    run.serve = lambda *configs: started.append(configs)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moe_serve.server.run", run)
    assert main(["serve", "--port", "0", "--no-enable-prefix-caching", "--block-size", "8", "--no-supervisor"]) == 0
    engine = EngineConfig.of(model=default_model(), enable_prefix_caching=False, page_size=8)
    assert started == [(ServerConfig(port=0, supervisor=False), engine, ParallelConfig())]
