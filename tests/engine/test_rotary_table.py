"""A table in the place of Phi-3.5-MoE's rotary embedding gives the same cosines and sines."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from moe_serve.hf import rope

from ..families.tiny_configs import CASES


def test_a_table_is_what_the_module_computes() -> None:
    module = PhimoeRotaryEmbedding(CASES["phimoe"].config())
    model = nn.Module()
    model.rotary_emb = module
    rope.tabulate(model, 32, torch.device("cpu"))
    table = model.rotary_emb
    assert isinstance(table, rope.Tabulated)
    like, positions = torch.empty(1, dtype=torch.bfloat16), torch.tensor([[5, 0, 31]])
    for got, expected in zip(table(like, position_ids=positions), module(like, positions), strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, expected)
