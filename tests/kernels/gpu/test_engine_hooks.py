"""How the engine uses the kernels: cached experts in a pool, resident experts, attention; against plain loops."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.experts import ResidentExperts
from expert_cache.gpu_managed.layout import layout_of
from expert_cache.gpu_managed.pool import PooledExpert, SlotPool
from expert_cache.host_managed.cache import ExpertCache
from expert_cache.host_managed.experts import HostManagedExperts
from expert_cache.policies import find_policy
from expert_cache.running.local_experts import LocalExperts
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage.arena import HostArena
from expert_cache.storage.copy_stream import CudaCopyStream, SlotOrder
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertStore
from expert_cache.storage.transit import Transit
from moe_serve.execution.forward_batch import DecodeGroup
from moe_serve.execution.kv_cache import LayerKV, LayerKVShape, Scratch
from moe_serve.hf import attend
from moe_serve_kernels.cpu import paged_attention
from moe_serve_kernels.cpu.expert_mlp import Activation
from predictors.shape import MoELayer

from ...expert_cache import stores

Choice = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""hidden [T, H], ids [T, K], weights [T, K]."""
SILU, CLAMPED = stores.SILU, stores.CLAMPED


def compute_of(store: ExpertStore, device: torch.device, num_slots: int, activation: Activation = SILU) -> GpuCompute:
    pool = SlotPool(layout_of(store.weights(store.layers[0], 0), torch.float32), num_slots, device)
    return GpuCompute(activation, torch.float32, device, pool)


def cached(store: ExpertStore, device: torch.device, num_slots: int) -> HostManagedExperts[object]:
    compute = compute_of(store, device, num_slots)
    policy = find_policy("lru")(len(store.layers), store.num_experts)
    size = (num_slots, store.slot_bytes)
    arena = HostArena(*size) if device.type == "cpu" else beside_kernels(compute, *size, device)
    cache = ExpertCache(store, compute.prepare, arena, Capacity.shared(num_slots), 0, policy, Fetcher())
    return HostManagedExperts(cache, compute)


def beside_kernels(compute: GpuCompute, num_slots: int, slot_bytes: int, device: torch.device) -> Transit:
    """An arena that fills the pool on a stream of its own."""
    stream = CudaCopyStream(device)
    compute.pool.order = SlotOrder(stream)
    return Transit(num_slots, slot_bytes, device, stream)


def choices(
    device: torch.device, num_tokens: int = 4, top_k: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(num_tokens, stores.H, device=device)
    ids = torch.rand(num_tokens, stores.E).topk(top_k).indices.to(device)
    return hidden, ids, torch.rand(num_tokens, top_k, device=device)


def check(
    layers: LocalExperts[Any], store: ExpertStore, layer: MoELayer, activation: Activation, choice: Choice
) -> None:
    got = layers.run(layer, *choice)
    hidden, ids, weights = (t.cpu() for t in choice)
    expected = stores.expected(store, activation, layer, hidden, ids, weights)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("num_slots", [2, 10])
def test_cached_experts_in_waves(device: torch.device, tmp_path: Path, num_slots: int) -> None:
    """With 2 slots a step's experts come in waves, and slots are taken back and used again."""
    store = stores.split_store(tmp_path)
    layers = cached(store, device, num_slots)
    for step in range(4):
        check(layers, store, store.layers[step % 2], SILU, choices(device))
    assert layers.counters.num_misses > 0
    layers.close()


def test_resident_experts_need_no_host(device: torch.device, tmp_path: Path) -> None:
    store = stores.fused_store(tmp_path)
    compute = compute_of(store, device, store.num_total)
    layers = ResidentExperts(store, compute, device)
    assert compute.pool.num_free == 0
    for layer in store.layers:
        for num_tokens in (1, 6):
            check(layers, store, layer, SILU, choices(device, num_tokens))


def test_biased_transposed_interleaved_experts(device: torch.device, tmp_path: Path) -> None:
    """GPT-OSS's layout is put right on the way into the pool."""
    store = stores.gpt_oss_store(tmp_path)
    compute = compute_of(store, device, store.num_total, CLAMPED)
    layers = ResidentExperts(store, compute, device)
    check(layers, store, store.layers[0], CLAMPED, choices(device))


def test_a_slot_is_free_again_when_its_expert_is_gone(device: torch.device, tmp_path: Path) -> None:
    store = stores.split_store(tmp_path)
    pool = SlotPool(layout_of(store.weights(store.layers[0], 0), torch.float32), 2, device)
    first, second = (pool.put(store.weights(store.layers[0], e)) for e in (0, 1))
    assert (first.slot, second.slot, pool.num_free) == (0, 1, 0)
    del first
    gc.collect()
    again = pool.put(store.weights(store.layers[1], 4))
    assert isinstance(again, PooledExpert)
    assert again.slot == 0
    assert torch.equal(stores.plain(again.down).cpu(), stores.plain(store.weights(store.layers[1], 4).down))


def test_attention_uses_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "is_available", lambda device, dtype: False)
    layer = LayerKV(LayerKVShape(2, 32, 32), 6, 16, torch.float32, device, Scratch())
    layer.keys.normal_()
    layer.values.normal_()
    table = torch.tensor([[3, 1], [5, 0]], device=device)
    group = DecodeGroup(0, table, torch.tensor([20, 9], device=device), 20, even=False, single_run=None)
    query = torch.randn(4, 2, 32, device=device)
    assert attend.in_place_kernel(device, torch.float32) is not None
    assert attend.in_place_kernel(device, torch.float64) is None
    got = attend.Attend(0.2, None, None).decode(query, layer, group)
    expected = attend.Attend(0.2, None, None)._decode_gathered(query, layer, group)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)
