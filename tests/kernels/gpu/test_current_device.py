"""Every kernel is launched while its device is the current one: Triton asks the thread, not the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from moe_serve import LLM, SamplingParams
from moe_serve.config import EngineConfig
from moe_serve.engine import model_runner
from moe_serve.parallel.modes.runner import Outcome
from moe_serve.parallel.ranks import worker
from moe_serve.parallel.wire.messages import Step, StepDone
from moe_serve_kernels.gpu import is_interpreted
from moe_serve_kernels.gpu.routing import route
from moe_serve_kernels.routings import Routing

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="launches are noted in the interpreter")


@dataclass
class Launches:
    """The current device at each launch; None outside every guard."""

    current: torch.device | None = None
    seen: list[torch.device | None] = field(default_factory=list)

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Guards and launches, noted."""
    noted = Launches()
    launch = GridExecutor.__call__

    def call(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        noted.seen.append(noted.current)
        launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    for module in (model_runner, worker):
        monkeypatch.setattr(module, "on_device", noted.on_device)
    return noted


def test_an_engine_launches_on_its_device(
    device: torch.device, folders: Callable[[str], Path], launches: Launches
) -> None:
    llm = LLM(str(folders("mixtral")), dtype="float32", device=str(device), max_model_len=32, num_kv_pages=8)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0))
    assert launches.seen
    assert set(launches.seen) == {device}


def test_a_rank_launches_on_its_device(
    device: torch.device, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank without a sequence of its own runs experts outside the model runner."""

    def run(_: object) -> Outcome:
        route(torch.randn(1, 4, device=device), Routing(2, "softmax"))
        return Outcome({}, {}, None)

    monkeypatch.setattr(worker, "StepReader", MagicMock())
    model = MagicMock(config=EngineConfig(model="any", device=str(device)), mode=MagicMock(run=run))
    done = worker.Worker(model).answer(MagicMock(spec=Step))
    assert isinstance(done, StepDone)
    assert launches.seen == [device]
