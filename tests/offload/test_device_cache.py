"""When the GPU manages its expert cache, when the host does, and what the log says about it."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cache.gpu_managed.cache import shares
from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.layout import layout_of
from expert_cache.gpu_managed.pool import SlotPool
from expert_cache.running.compute import ExpertCompute
from expert_cache.storage.store import ExpertStore
from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError
from moe_serve.offload import gpu_managed as module

from ..expert_cache import stores

CPU = torch.device("cpu")
REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "policy": ({"moe_cache_policy": "lfu"}, "--moe-cache-policy lfu"),
    "pool": ({"moe_cache_pool": "global"}, "--moe-cache-pool global"),
    "shadow": ({"moe_cache_shadow": "lfu"}, "--moe-cache-shadow"),
    "prefetch": ({"moe_prefetch": "affinity"}, "--moe-prefetch"),
    "cpu_misses": ({"moe_cpu_misses": True}, "--moe-cpu-misses"),
    "predictor": ({"moe_predictor": "file"}, "--moe-predictor"),
}


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return stores.split_store(tmp_path)


def gpu_compute(store: ExpertStore, num_slots: int = 4) -> GpuCompute:
    """Nothing in it runs here."""
    pool = SlotPool(layout_of(store.weights(store.layers[0], 0), torch.float32), num_slots, CPU)
    return GpuCompute(stores.SILU, torch.float32, CPU, pool)


@pytest.mark.parametrize("name", REASONS)
def test_settings_that_need_the_host(store: ExpertStore, caplog: pytest.LogCaptureFixture, name: str) -> None:
    settings, words = REASONS[name]
    with caplog.at_level(logging.WARNING):
        assert module.gpu_managed_experts(EngineConfig.of(**settings), store, gpu_compute(store), CPU) is None
    (record,) = caplog.records
    assert words in record.getMessage()
    with pytest.raises(ConfigError, match=words):
        module.gpu_managed_experts(
            EngineConfig.of(moe_cache_manager="device", **settings), store, gpu_compute(store), CPU
        )


def test_fewer_slots_than_layers(store: ExpertStore, caplog: pytest.LogCaptureFixture) -> None:
    assert module.gpu_managed_experts(EngineConfig(), store, gpu_compute(store, 1), CPU) is None
    assert "1 experts, fewer than the 2 layers" in caplog.text


def test_too_little_host_memory(
    store: ExpertStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    assert module.gpu_managed_experts(EngineConfig(), store, gpu_compute(store), CPU) is None
    assert "pinned memory" in caplog.text


def test_host_memory_of_a_cache_that_failed_is_given_back(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When torch is told to release what is free, nothing holds what had been read any more."""
    read: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def fail(store: ExpertStore, compute: GpuCompute, device: torch.device) -> None:
        chunk = torch.empty(8)
        read.append(weakref.ref(chunk))
        raise RuntimeError("cudaHostAlloc failed")

    monkeypatch.setattr(module, "GpuManagedExperts", fail)
    monkeypatch.setattr(module, "release_pinned", lambda: alive.append(read[0]() is not None))
    assert module.gpu_managed_experts(EngineConfig(), store, gpu_compute(store), CPU) is None
    assert alive == [False]


def test_the_host_when_it_is_asked_for(store: ExpertStore, caplog: pytest.LogCaptureFixture) -> None:
    assert module.gpu_managed_experts(EngineConfig.of(moe_cache_manager="host"), store, gpu_compute(store), CPU) is None
    assert not caplog.records


def test_no_gpu(store: ExpertStore, caplog: pytest.LogCaptureFixture) -> None:
    compute = ExpertCompute(stores.SILU, torch.float32, CPU, 0)
    assert module.gpu_managed_experts(EngineConfig(), store, compute, CPU) is None
    assert not caplog.records
    with pytest.raises(ConfigError, match="no GPU"):
        module.gpu_managed_experts(EngineConfig.of(moe_cache_manager="device"), store, compute, CPU)


def test_slots_are_shared_evenly() -> None:
    assert shares(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert shares(2, 2) == [(0, 1), (1, 2)]
