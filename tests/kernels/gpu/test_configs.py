"""Which configuration a GPU gets, and what runs where it refuses one."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import configs, fallback, gpu_model, grouped, paged_attention
from moe_serve_kernels.gpu.configs import GroupedConfig, Tile
from moe_serve_kernels.gpu.gpu_model import GpuModel, known
from moe_serve_kernels.gpu.moe_layer import moe_layer, run_pairs, run_segments
from moe_serve_kernels.gpu.weight_format import FORMATS, Format
from tests.support.gpu_references import moe_layer_reference

from .cases import Layer, make_layer

SILU = Activation("silu")
SMALL = (80, 86, 89, 120)
"""Compute capabilities whose GPUs lack the large matrix instructions or the shared memory for them."""


@pytest.mark.parametrize("format", FORMATS)
def test_configurations_follow_generation_and_shared_memory(format: Format) -> None:
    for capability in SMALL:
        assert configs.steps_of(known(capability), format) == configs.AMPERE_STEPS[format]
    for capability in (90, 100):
        assert configs.steps_of(known(capability), format) == configs.HOPPER_STEPS[format]
    assert configs.steps_of(GpuModel(100, 99 << 10), format) == configs.AMPERE_STEPS[format]


def test_a_gpu_is_asked_for_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(major=12, minor=0, shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert gpu_model.model_of.__wrapped__(torch.device("cuda", 0)) == known(120)


@pytest.mark.parametrize("capability", gpu_model.SHARED_BYTES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_tried_next_is_always_smaller(capability: int, format: Format) -> None:
    gpu = known(capability)
    for config in configs.steps_of(gpu, format).values():
        following = configs.smaller(gpu, format, config)
        assert config not in following
        assert following[-1] == configs.FLOAT32
        left = [len(configs.smaller(gpu, format, c)) for c in following]
        assert left == sorted(left, reverse=True)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """A GPU that refuses every `down` but the last resort's, after `gate_up` was launched."""
    refused: list[Tile] = []
    launch = grouped.down

    def down(*arguments: Any) -> None:
        tile = arguments[-1]
        if tile != configs.FLOAT32.down:
            refused.append(tile)
            raise OutOfResources(110_592, 101_376, "shared memory")
        launch(*arguments)

    monkeypatch.setattr(grouped, "down", down)
    fallback._warn.cache_clear()
    return refused


def bf16_layer(device: torch.device) -> Layer:
    return make_layer(20, 2, 2, 64, 64, device, dtype=torch.bfloat16, routing="all")


def test_a_refused_configuration_is_replaced_by_a_smaller_one(
    device: torch.device, refusing: list[Tile], caplog: pytest.LogCaptureFixture
) -> None:
    layer = bf16_layer(device)
    arguments = (layer.x, layer.ids, layer.weights, layer.slot_of, layer.pool, SILU)
    with caplog.at_level(logging.WARNING):
        got = moe_layer(*arguments)
        torch.testing.assert_close(got.double(), moe_layer_reference(*arguments), rtol=3e-2, atol=3e-2)
        assert len(refusing) > 1
        assert len(caplog.records) == len(refusing)
        assert torch.equal(moe_layer(*arguments), got)
    assert len(caplog.records) * 2 == len(refusing)
    assert "a smaller one is used" in caplog.text


def test_waves_and_segments_fall_back_too(device: torch.device, refusing: list[Tile]) -> None:
    layer = bf16_layer(device)
    outputs, sorted_outputs = (torch.full((40, 64), torch.nan, device=device) for _ in range(2))
    run_pairs(layer.x, layer.ids, layer.slot_of, layer.pool, SILU, outputs)
    order = layer.ids.flatten().sort(stable=True).indices
    slots = layer.slot_of.tolist()
    run_segments(layer.x, order // 2, [(0, 20), (20, 40)], slots, layer.pool, SILU, sorted_outputs)
    assert torch.equal(outputs[order], sorted_outputs)
    assert len(refusing) > 2


def test_a_configuration_that_was_asked_for_is_not_replaced(device: torch.device, refusing: list[Tile]) -> None:
    """The tuner must not take the time of another one for it."""
    layer = bf16_layer(device)
    arguments = (layer.x, layer.ids, layer.weights, layer.slot_of, layer.pool, SILU)
    tile = Tile(16, 32, 32, 4, 3, True)
    with pytest.raises(OutOfResources):
        moe_layer(*arguments, GroupedConfig(tile, tile))
    assert refusing == [tile]


def test_a_gpu_that_takes_nothing_is_an_error(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(grouped, "down", refuse)
    layer = bf16_layer(device)
    with pytest.raises(OutOfResources):
        moe_layer(layer.x, layer.ids, layer.weights, layer.slot_of, layer.pool, SILU)


def test_attention_falls_back(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys = torch.randn(2, 4, 32, device=device), torch.randn(2, 64, 32, device=device)
    pages = torch.tensor([[0, 2], [3, 1]], device=device)
    lengths = torch.tensor([30, 17], device=device)
    arguments = (query, keys, keys.clone(), pages, lengths)
    expected = paged_attention.paged_decode(*arguments, page_size=16, scale=0.2)
    options_of, refused = paged_attention._options, []

    def options(tile: Any) -> dict[str, Any]:
        if tile.num_stages > 1:
            refused.append(tile)
            raise OutOfResources(110_592, 101_376, "shared memory")
        return options_of(tile)

    monkeypatch.setattr(paged_attention, "_options", options)
    got = paged_attention.paged_decode(*arguments, page_size=16, scale=0.2)
    assert len(refused) == 1
    torch.testing.assert_close(got, expected)
