"""Layers with fewer slots than experts, planned and copied on the device; on a GPU as one captured graph."""

from __future__ import annotations

import pytest
import torch

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu.cached_layer import CachedLayers
from moe_serve_kernels.gpu.pool import ExpertPool, empty_bank
from moe_serve_kernels.gpu.weight_format import Format
from tests.support.gpu_references import moe_layer_reference

from .cases import make_ids, make_pool, poison

LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 2, 6, 64, 64, 2
SILU = Activation("silu")


def make(
    device: torch.device, slots_per_layer: int, format: Format = "plain"
) -> tuple[CachedLayers, list[tuple[ExpertPool, torch.Tensor]]]:
    """The cache, and for each layer a pool that holds all its experts, with its table."""
    wholes = [make_pool(EXPERTS, HIDDEN, INNER, device, format) for _ in range(LAYERS)]
    hosts: list[dict[str, list[torch.Tensor]]] = []
    banks = []
    for name, shape in (("gate_up", (2, INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
        slots = LAYERS * slots_per_layer
        bank = empty_bank(slots, shape, format, torch.float32, device, group_size=32)
        parts = [getattr(pool, name).parts() for pool, _ in wholes]
        host = {p: torch.cat([part[p][t.long()] for part, (_, t) in zip(parts, wholes, strict=True)]) for p in parts[0]}
        hosts.append({p: list(t.cpu().pin_memory() if device.type == "cuda" else t) for p, t in host.items()})
        for tensor in bank.parts().values():
            poison(tensor)
        banks.append(bank)
    ranges = [(i * slots_per_layer, (i + 1) * slots_per_layer) for i in range(LAYERS)]
    gate_up, down = hosts
    return CachedLayers(gate_up, down, ExpertPool(*banks), EXPERTS, ranges), wholes


def check(
    got: torch.Tensor, whole: tuple[ExpertPool, torch.Tensor], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    pool, slot_of = whole
    expected = moe_layer_reference(x, ids, weights, slot_of, pool, SILU)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("num_tokens", "slots"), [(1, 3), (2, 4), (7, 2)], ids=["decode", "just enough", "in waves"])
def test_steps(device: torch.device, num_tokens: int, slots: int) -> None:
    layers, wholes = make(device, slots)
    for step in range(4):
        layer = step % LAYERS
        ids = make_ids(num_tokens, TOP_K, EXPERTS, "random").to(device)
        x, weights = torch.randn(num_tokens, HIDDEN, device=device), torch.rand(num_tokens, TOP_K, device=device)
        check(layers.run(layer, x, ids, weights, SILU), wholes[layer], x, ids, weights)
    assert int(layers.state.totals[1].sum()) > 0


@pytest.mark.parametrize("format", ["int8", "int8_groups", "mxfp4", "nvfp4"])
def test_quantised_parts_are_all_copied(device: torch.device, format: Format) -> None:
    layers, wholes = make(device, 3, format)
    x, weights = torch.randn(1, HIDDEN, device=device), torch.rand(1, TOP_K, device=device)
    ids = torch.tensor([[4, 1]], device=device)
    check(layers.run(1, x, ids, weights, SILU), wholes[1], x, ids, weights)


def test_a_decode_step_is_one_graph(device: torch.device) -> None:
    """Captured once, replayed with routings that were not known then."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    layers, wholes = make(device, 3)
    x, weights = torch.randn(1, HIDDEN, device=device), torch.rand(1, TOP_K, device=device)
    ids = torch.zeros(1, TOP_K, dtype=torch.int64, device=device)

    def step() -> list[torch.Tensor]:
        return [layers.run(layer, x, ids, weights, SILU) for layer in range(LAYERS)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for _ in range(6):
        ids.copy_(make_ids(1, TOP_K, EXPERTS, "random"))
        x.normal_()
        graph.replay()
        for out, whole in zip(outs, wholes, strict=True):
            check(out, whole, x, ids, weights)
