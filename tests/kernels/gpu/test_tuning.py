"""The search over configurations with made-up times, the file it fills, and what a layer call takes from it."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import pytest
import torch

from moe_serve_kernels.gpu import configs, tuned
from moe_serve_kernels.gpu.configs import Config, GemvConfig, GroupedConfig
from moe_serve_kernels.gpu.gpu_model import SHARED_BYTES, known
from moe_serve_kernels.gpu.tuned import Shape, Tuned
from moe_serve_kernels.gpu.tuning import neighbours, random_layers, tune
from moe_serve_kernels.gpu.weight_format import FORMATS, Format

SHAPE = Shape(64, 32, 8, 2, "plain")


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_choice_is_a_candidate(capability: int, format: Format) -> None:
    for tokens in (1, 4, 8, 9, 100, 10_000):
        chosen = configs.choose(known(capability), format, tokens, 2, 8)
        assert chosen in configs.candidates(known(capability), format)


def test_the_search_climbs_from_the_closed_set() -> None:
    start = configs.HOPPER_STEPS["plain"][64]
    better = dataclasses.replace(start, down=dataclasses.replace(start.down, num_stages=3))
    best = dataclasses.replace(better, gate_up=dataclasses.replace(better.gate_up, block_f=64))
    times: dict[Config, float] = {start: 3.0, better: 2.0, best: 1.0}
    assert tune(known(90), SHAPE, 64, lambda config: times.get(config, 5.0)) == (best, 1.0)


def test_noise_does_not_win() -> None:
    start = configs.HOPPER_STEPS["plain"][16]
    found, _ = tune(
        known(90), SHAPE, 64, lambda config: 1.0 if config == start else 0.99 if config in neighbours(start) else 2.0
    )
    assert found == start


def test_what_does_not_fit_is_never_chosen() -> None:
    fits = configs.HOPPER_STEPS["plain"][32]
    assert tune(known(90), SHAPE, 64, lambda config: 1.0 if config == fits else math.inf) == (fits, 1.0)


def test_many_tokens_are_never_taken_one_by_one() -> None:
    asked: list[Config] = []

    def measure(config: Config) -> float:
        asked.append(config)
        return 1.0

    tune(known(90), SHAPE, 9, measure)
    assert not any(isinstance(config, GemvConfig) for config in asked)
    asked.clear()
    tune(known(90), SHAPE, 8, measure)
    assert any(isinstance(config, GemvConfig) for config in asked)


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    found: Tuned = {SHAPE.key: {1: configs.GEMV["plain"], 64: configs.HOPPER_STEPS["plain"][64]}}
    tuned.write(tmp_path / "a" / "gpu.json", found)
    assert tuned.read(tmp_path / "a" / "gpu.json") == found


def test_the_smallest_number_of_tokens_that_is_enough() -> None:
    found: Tuned = {SHAPE.key: {4: configs.GEMV["plain"], 64: configs.HOPPER_STEPS["plain"][64]}}
    assert tuned.find(found, SHAPE, 3) == configs.GEMV["plain"]
    assert isinstance(tuned.find(found, SHAPE, 5), GroupedConfig)
    assert tuned.find(found, SHAPE, 65) is None
    assert tuned.find(found, dataclasses.replace(SHAPE, hidden=128), 1) is None


@pytest.mark.parametrize(
    "text", ["", "{}", '{"version": 99, "shapes": {}}', '{"version": 1, "shapes": {"a": {"1": {}}}}']
)
def test_a_damaged_file_is_ignored_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuned.path_of("NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    tuned.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert tuned.load("NVIDIA H100 80GB HBM3") == {}
    assert str(path) in caplog.text
    tuned.load.cache_clear()


def test_random_layers_have_finite_weights(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve_kernels.gpu.tuning.COLD_BYTES", 1)
    formats: tuple[Format, ...] = ("plain", "int8", "fp8")
    for format in formats:
        pool, tables = random_layers(dataclasses.replace(SHAPE, format=format), torch.float32, device)
        assert len(tables) == 2
        assert sorted(torch.cat(tables).tolist()) == list(range(16))
        assert bool(pool.down.data.float().isfinite().all())
