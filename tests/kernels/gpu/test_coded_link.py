"""bf16 experts that travel in 12-bit codes: every bit of a slot, rare weights included, and layers that use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expert_cache.gpu_managed.cache import GpuManagedExperts, host_bytes
from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.layout import layout_of
from expert_cache.gpu_managed.pool import SlotPool
from expert_cache.storage.store import ExpertStore, StoredTensor
from moe_serve_kernels.cpu.coded import encode
from moe_serve_kernels.gpu import coded_link
from tests.support.gpu_references import moe_layer_reference

from ...expert_cache import stores

EXPERTS, SLOTS = 3, 2
SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-38, -3e38, 1.0)
Matrices = dict[str, torch.Tensor]


def made(rows: int, columns: int, special: bool) -> torch.Tensor:
    """bf16 [rows, columns] like trained ones; `special`: with rare weights at both ends of rows, and many in one."""
    floats: torch.Tensor = (torch.randn(rows, columns) * columns**-0.5).to(torch.bfloat16)
    if special:
        floats[0, -1] = floats[-1, 0] = torch.inf
        floats[1, : len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.bfloat16)
    return floats


def coded_store(folder: Path, hidden: int, inner: int, special: bool) -> tuple[ExpertStore, list[Matrices]]:
    """One layer of experts in codes, and their bf16 weights."""
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    floats = [{part: made(*shape, special) for part, shape in shapes.items()} for _ in range(EXPERTS)]
    tensors: Matrices = {}
    for expert, matrices in enumerate(floats):
        for part, matrix in matrices.items():
            found = encode(matrix)
            assert found is not None
            names = (part, f"{part}_exponents", f"{part}_rare")
            tensors |= {f"{expert}.{name}": t for name, t in zip(names, found.tensors, strict=True)}
    file = folder / "experts.safetensors"
    save_file(tensors, file)
    parts: dict[tuple[str, int | None], StoredTensor] = {
        (t.name.split(".")[1], int(t.name.split(".")[0])): t for t in stores.stored(file)
    }
    return ExpertStore({0: parts}, EXPERTS, shape=(inner, hidden)), floats


def cached(store: ExpertStore, device: torch.device) -> GpuManagedExperts:
    pool = SlotPool(layout_of(store.weights(store.layers[0], 0), torch.bfloat16), SLOTS, device)
    return GpuManagedExperts(store, GpuCompute(stores.SILU, torch.bfloat16, device, pool), device)


def check_bits(experts: GpuManagedExperts, floats: list[Matrices], ids: list[int]) -> None:
    """The experts' slots hold their bf16 bits."""
    assert isinstance(experts.compute, GpuCompute)
    pool, slot_of = experts.compute.pool.experts, experts._layers.state.slot_of
    for expert in ids:
        slot, wanted = int(slot_of[expert]), floats[expert]
        both = torch.stack([wanted["gate"], wanted["up"]])
        for data, matrix in ((pool.gate_up.data[slot], both), (pool.down.data[slot], wanted["down"])):
            assert torch.equal(data.cpu().view(torch.int16), matrix.view(torch.int16))


@pytest.mark.slow
def test_a_layer_of_experts_in_codes(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded_link, "DECODE_PROGRAMS", 4)
    store, floats = coded_store(tmp_path, 128, 128, special=False)
    experts = cached(store, device)
    x, weights = torch.randn(1, 128, device=device).to(torch.bfloat16), torch.rand(1, 1, device=device)
    ids = torch.tensor([[1]], device=device)
    got = experts.run(store.layers[0], x, ids, weights)
    check_bits(experts, floats, [1])
    assert isinstance(experts.compute, GpuCompute)
    pool, slot_of = experts.compute.pool.experts, experts._layers.state.slot_of
    expected = moe_layer_reference(x, ids, weights, slot_of, pool, stores.SILU)
    torch.testing.assert_close(got.double(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.slow
def test_every_bit_arrives(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no whole group and longer than a program's block, rare weights, and slots that are taken again."""
    monkeypatch.setattr(coded_link, "BLOCK", 128)
    monkeypatch.setattr(coded_link, "DECODE_PROGRAMS", 4)
    store, floats = coded_store(tmp_path, 250, 120, special=True)
    experts = cached(store, device)
    for ids in ([2], [0, 1]):
        experts._layers._bring(0, torch.tensor([ids], device=device))
        check_bits(experts, floats, ids)


def test_records_take_less_than_slots(device: torch.device, tmp_path: Path) -> None:
    store, _ = coded_store(tmp_path, 512, 256, special=False)
    layout = layout_of(store.weights(store.layers[0], 0), torch.bfloat16)
    compute = GpuCompute(stores.SILU, torch.bfloat16, device, SlotPool(layout, SLOTS, device))
    assert host_bytes(store, compute) < 0.77 * store.num_total * sum(layout.part_bytes())
