"""Every tile that is shipped, with its own sizes, on experts with a full tile and a ragged one, one token, and none.

In the interpreter that finds wrong masks, edges and strides. What a compiler makes of a tile, only a GPU can tell.
"""

from __future__ import annotations

import pytest
import torch

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu.configs import Config, GroupedConfig, candidates
from moe_serve_kernels.gpu.gpu_model import SHARED_BYTES, known
from moe_serve_kernels.gpu.moe_layer import moe_layer
from moe_serve_kernels.gpu.weight_format import FORMATS, Format
from tests.support.gpu_references import moe_layer_reference

from .cases import make_layer

HIDDEN, INNER = 192, 128
"""Of two and three steps of most loops; one group of int4, which has 64 inputs here."""
SHIPPED = sorted(
    {(format, config) for arch in SHARED_BYTES for format in FORMATS for config in candidates(known(arch), format)},
    key=str,
)


def counts_of(config: Config) -> tuple[int, int, int]:
    """Tokens of each expert."""
    full = config.gate_up.block_t if isinstance(config, GroupedConfig) else 2
    return full + 3, 0, 1


@pytest.mark.slow
@pytest.mark.parametrize(("format", "config"), SHIPPED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(SHIPPED)])
def test_a_shipped_tile(device: torch.device, format: Format, config: Config) -> None:
    counts = counts_of(config)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    layer = make_layer(
        sum(counts), 1, len(counts), HIDDEN, INNER, device, format=format, dtype=dtype, with_bias=True, group_size=64
    )
    layer.ids.copy_(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None])
    arguments = (layer.x, layer.ids, layer.weights, layer.slot_of, layer.pool, Activation("silu"))
    got, expected = moe_layer(*arguments, config), moe_layer_reference(*arguments)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_all_are_listed() -> None:
    assert {format for format, _ in SHIPPED} == set(FORMATS)
    assert {config.gate_up.block_t for _, config in SHIPPED if isinstance(config, GroupedConfig)} >= {16, 32, 64, 128}
