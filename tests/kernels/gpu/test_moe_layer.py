"""One MoE layer by every configuration, against float64 on what the pool holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_serve_kernels.cpu.expert_mlp import KINDS, Activation, Kind
from moe_serve_kernels.gpu import configs, gemv
from moe_serve_kernels.gpu.combine import combine
from moe_serve_kernels.gpu.configs import Config, Gemv, GemvConfig, GroupedConfig, Tile, choose
from moe_serve_kernels.gpu.gpu_model import known
from moe_serve_kernels.gpu.moe_layer import moe_layer, run_pairs
from moe_serve_kernels.gpu.weight_format import FORMATS, Format
from tests.support.gpu_references import combine_reference, moe_layer_reference

from .cases import Layer, make_layer

SILU = Activation("silu")
GEMV = GemvConfig(Gemv(16, 64, 4), Gemv(16, 64, 4))
SWAPPED = GroupedConfig(Tile(16, 32, 32, 4, 2, True), Tile(16, 32, 64, 4, 2, True))
STRAIGHT = GroupedConfig(Tile(16, 32, 32, 4, 2, False), Tile(16, 64, 32, 4, 2, False))
CONFIGS: dict[str, Config] = {"gemv": GEMV, "swapped": SWAPPED, "straight": STRAIGHT}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(layer: Layer, config: Config | None, activation: Activation = SILU) -> None:
    arguments = (layer.x, layer.ids, layer.weights, layer.slot_of, layer.pool, activation)
    got = moe_layer(*arguments, config)
    expected = moe_layer_reference(*arguments)
    assert got.dtype == layer.x.dtype
    tolerance = TOLERANCE[layer.x.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("routing", ["random", "one", "all"])
def test_routings(device: torch.device, name: str, routing: str) -> None:
    check(make_layer(5, 2, 4, 72, 40, device, routing=routing), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(device: torch.device, name: str, dtype: torch.dtype) -> None:
    check(make_layer(3, 2, 4, 64, 32, device, dtype=dtype), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format", FORMATS)
def test_formats(device: torch.device, name: str, format: Format) -> None:
    check(make_layer(3, 2, 3, 64, 192, device, format=format), CONFIGS[name])


@pytest.mark.parametrize("format", FORMATS)
def test_formats_with_biases_and_bf16(device: torch.device, format: Format) -> None:
    layer = make_layer(3, 2, 3, 64, 64, device, format=format, with_bias=True, dtype=torch.bfloat16)
    for config in (GEMV, SWAPPED):
        check(layer, config, Activation("clamped_swiglu"))


@pytest.mark.parametrize("format", ["plain", "mxfp4"])
def test_a_split_sum_has_the_same_terms(device: torch.device, format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for each pair, and one for all pairs of a token; an expert in no slot, and padding."""
    layer = make_layer(3, 2, 3, 64, 64, device, format=format, with_bias=True)
    layer.slot_of[1] = -1
    layer.ids[2, 1] = -1
    assert gemv.is_split(layer.ids, 64, GEMV.down)
    check(layer, GEMV)
    monkeypatch.setattr(gemv, "FEW_PROGRAMS", 0)
    assert not gemv.is_split(layer.ids, 64, GEMV.down)
    check(layer, GEMV)


def test_what_is_split() -> None:
    """Where one token has few output tiles: 32 outputs of a packed format each, 8 of the others."""
    one, two = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
    packed, plain = configs.GEMV["int4"].down, configs.GEMV["plain"].down
    assert gemv.is_split(one, 4096, packed)
    assert not gemv.is_split(two, 4096, packed)
    assert not gemv.is_split(one, 2048, plain)
    assert not gemv.is_split(one[:, :1], 2048, packed)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(device: torch.device, name: str, kind: Kind) -> None:
    layer = make_layer(2, 2, 3, 32, 32, device, with_bias=True)
    check(layer, CONFIGS[name], Activation(kind, alpha=1.5, limit=0.5))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (33, 65), (96, 16)])
def test_odd_shapes(device: torch.device, name: str, hidden: int, inner: int) -> None:
    check(make_layer(3, 1, 2, hidden, inner, device), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_more_tokens_than_a_tile(device: torch.device, name: str) -> None:
    check(make_layer(21, 2, 3, 32, 32, device), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_nobodys_choices(device: torch.device, name: str) -> None:
    """Rows that choose nobody get zeros, and the others the bits that they have without them."""
    layer = make_layer(6, 2, 4, 64, 32, device)
    ids = layer.ids.clone()
    ids[[1, 4]] = -1
    ids[2, 0] = -1
    check(dataclasses.replace(layer, ids=ids), CONFIGS[name])
    others = (layer.slot_of, layer.pool, SILU, CONFIGS[name])
    padded = moe_layer(layer.x, ids, layer.weights, *others)
    assert not bool(padded[[1, 4]].any())
    alone = moe_layer(layer.x[[0, 3, 5]], ids[[0, 3, 5]], layer.weights[[0, 3, 5]], *others)
    assert torch.equal(padded[[0, 3, 5]], alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tokens(device: torch.device, name: str) -> None:
    check(make_layer(0, 2, 3, 32, 32, device), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_in_no_slot_are_left_out(device: torch.device, name: str) -> None:
    layer = make_layer(6, 2, 4, 32, 32, device)
    layer.slot_of[::2] = -1
    check(layer, CONFIGS[name])
    layer.slot_of.fill_(-1)
    check(layer, CONFIGS[name])


@pytest.mark.parametrize("config", [SWAPPED, STRAIGHT], ids=["swapped", "straight"])
def test_waves_add_up_to_the_whole_bit_by_bit(device: torch.device, config: GroupedConfig) -> None:
    """Each wave writes its experts' rows and no other."""
    layer = make_layer(6, 2, 4, 48, 32, device)
    whole = moe_layer(layer.x, layer.ids, layer.weights, layer.slot_of, layer.pool, SILU, config)
    outputs = torch.full((12, 48), torch.nan, device=device)
    for wave in ([0, 2], [1], [3]):
        slot_of = torch.full_like(layer.slot_of, -1)
        slot_of[wave] = layer.slot_of[wave]
        before = outputs.clone()
        run_pairs(layer.x, layer.ids, slot_of, layer.pool, SILU, outputs, config)
        others = ~torch.isin(layer.ids.flatten(), torch.tensor(wave, device=device))
        assert torch.equal(outputs[others], before[others]) or torch.isnan(before[others]).any()
        assert torch.equal(torch.isnan(outputs[others]), torch.isnan(before[others]))
    out = torch.empty_like(layer.x)
    combine(outputs, layer.ids, layer.weights, layer.slot_of, out)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_where_an_expert_lies_does_not_change_a_bit(device: torch.device, config: Config) -> None:
    layer = make_layer(4, 2, 3, 48, 32, device)
    before = moe_layer(layer.x, layer.ids, layer.weights, layer.slot_of, layer.pool, SILU, config)
    for bank in (layer.pool.gate_up, layer.pool.down):
        bank.data.copy_(bank.data.flip(0))
    moved = (layer.pool.down.num_slots - 1 - layer.slot_of).to(torch.int32)
    after = moe_layer(layer.x, layer.ids, layer.weights, moved, layer.pool, SILU, config)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine(device: torch.device, dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 2], [1, 0], [2, 2]], device=device)
    slot_of = torch.tensor([3, -1, 0], dtype=torch.int32, device=device)
    outputs = torch.randn(6, 1030, device=device).to(dtype)
    outputs[ids.flatten() == 1] = torch.nan
    weights = torch.randn(3, 2, device=device)
    got, expected = (torch.full((3, 1030), torch.nan, device=device) for _ in range(2))
    combine(outputs, ids, weights, slot_of, got)
    combine_reference(outputs, ids, weights, slot_of, expected)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_the_configuration_chosen_by_default(device: torch.device, num_tokens: int) -> None:
    check(make_layer(num_tokens, 2, 2, 128, 64, device, routing="all"), None)


TILES: list[tuple[int, Format, int, int]] = [
    (90, "plain", 16, 16),
    (90, "plain", 128, 32),
    (90, "plain", 4096, 128),
    (80, "int4", 4096, 64),
    (120, "plain", 4096, 128),
]
"""GPU generation, weight format, tokens, tokens of a tile."""


def test_choice_follows_tokens_per_expert() -> None:
    assert choose(known(90), "plain", 1, 8, 128) == choose(known(90), "plain", 8, 8, 128)
    for capability, format, num_tokens, block_t in TILES:
        chosen = choose(known(capability), format, num_tokens, 2, 8)
        assert isinstance(chosen, GroupedConfig)
        assert chosen.gate_up.block_t == block_t
