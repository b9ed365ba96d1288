"""A token's bits do not depend on how many tokens there are: every kernel of the CPU, every format of weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.decoder import DecodeInputs
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.cpu.expert_mlp import Activation, MLPWeights, expert_mlp
from moe_serve_kernels.cpu.layer_parts import LayerParts
from moe_serve_kernels.cpu.linear import LinearWeights, linear
from moe_serve_kernels.cpu.native_model import NativeModel
from moe_serve_kernels.cpu.prompt_step import Choices, PromptStep
from tests.kernels.quantized_experts import FORMS, Form, make_expert
from tests.kernels.test_decode_step import CASES, LAYERS, PAGE_SIZE, Tiny, tiny

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

COUNTS = (1, 2, 5, 6, 7, 8, 9, 11, 16, 31, 193, 400)
SILU = Activation("silu")


def alike(rows: torch.Tensor, others: torch.Tensor) -> bool:
    """Bit for bit; a NaN would be unlike itself."""
    return torch.equal(rows, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (17, 5), (70, 1030), (33, 2111)])
def test_linear(rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weights = LinearWeights(torch.randn(rows, columns).to(dtype), torch.randn(rows))
    x = torch.randn(max(COUNTS), columns)
    whole = linear(x, weights)
    for count in COUNTS:
        assert alike(linear(x[:count], weights), whole[:count])
        assert alike(linear(x[-count:], weights), whole[-count:])


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (17, 64), (3, 32), (200, 1024), (70, 50)])
def test_rounded_linear(rows: int, columns: int) -> None:
    """Products of tokens rounded to bf16, added up in float32."""
    torch.manual_seed(rows)
    weight, bias = torch.randn(rows, columns).bfloat16(), torch.randn(rows)
    weights = LinearWeights(weight, bias, rounds=True)
    x = torch.randn(max(COUNTS), columns)
    whole = linear(x, weights)
    exact = x.bfloat16().double() @ weight.double().T + bias.double()
    torch.testing.assert_close(whole.double(), exact, rtol=0, atol=1e-5 * columns)
    for count in COUNTS:
        assert alike(linear(x[:count], weights), whole[:count])
        assert alike(linear(x[-count:], weights), whole[-count:])


@pytest.mark.parametrize(("inner", "hidden"), [(96, 64), (160, 320), (48, 40)])
def test_a_rounded_expert(inner: int, hidden: int) -> None:
    torch.manual_seed(inner)
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    matrices = tuple(torch.randn(size).bfloat16() / 8 for size in sizes)
    gate_bias, up_bias, down_bias = torch.randn(inner), torch.randn(inner), torch.randn(hidden)
    expert = MLPWeights(matrices[0], matrices[1], matrices[2], gate_bias, up_bias, down_bias, rounds=True)
    x = torch.randn(40, hidden)
    whole = run_expert(x, expert)
    gate, up, down = (matrix.double() for matrix in matrices)
    rounded = x.bfloat16().double()
    activated = torch.nn.functional.silu(rounded @ gate.T + gate_bias) * (rounded @ up.T + up_bias)
    exact = activated.bfloat16().double() @ down.T + down_bias
    torch.testing.assert_close(whole.double(), exact, rtol=0, atol=2e-2 * float(exact.std()))
    for count in (1, 3, 6, 7, 20):
        assert alike(run_expert(x[:count], expert), whole[:count])


def run_expert(x: torch.Tensor, expert: MLPWeights) -> torch.Tensor:
    out = torch.empty_like(x)
    expert_mlp(x, torch.arange(len(x)), [(0, len(x))], [expert], SILU, out)
    return out


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantised_experts(form: Form) -> None:
    torch.manual_seed(3)
    expert = make_expert(form, 160, 96)
    x = torch.randn(40, expert.gate.shape[1])
    whole = run_expert(x, expert)
    for count in (1, 3, 6, 7, 20):
        assert alike(run_expert(x[:count], expert), whole[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_experts(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    matrices = [[torch.randn(size).to(dtype) / 8 for size in ((48, 64), (48, 64), (64, 48))] for _ in range(4)]
    layer = ExpertLayer([MLPWeights(*each) for each in matrices])
    x, ids = torch.randn(300, 64), torch.rand(300, 4).argsort(dim=1)[:, :2]
    weights = torch.rand(300, 2)
    whole, _ = layer.run(x, ids, weights, SILU)
    for count in COUNTS[:-1]:
        assert alike(layer.run(x[:count], ids[:count], weights[:count], SILU)[0], whole[:count])


LENGTHS = (9, 1, 150, 14)
"""Of some sequences; all of their tokens are in one step of LayerParts."""


def tokens_of(model: Tiny) -> DecodeInputs:
    """All tokens of all sequences, one after another."""
    torch.manual_seed(8)
    width = -(-max(LENGTHS) // PAGE_SIZE)
    pages = torch.randperm(width * len(LENGTHS)).view(len(LENGTHS), width)
    seqs = torch.cat([torch.full((length,), i) for i, length in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    slots = pages[seqs, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    angles = torch.outer(positions.float(), torch.rand(model.case.shape.rotary_dim // 2))
    x = torch.randn(len(seqs), model.case.hidden)
    starts = torch.tensor([*accumulate(LENGTHS, initial=0)])
    return DecodeInputs(x, angles.cos(), angles.sin(), slots, pages, positions + 1, starts)


def run_layers(model: Tiny, inputs: DecodeInputs) -> torch.Tensor:
    parts = LayerParts(NativeModel(model.case.shape, model.blocks, model.final_norm, model.head))
    for index, block in enumerate(model.blocks):
        hidden, ids, weights = parts.until_experts(index, inputs)
        if block.router is not None:
            parts.shared(index, inputs)
            assert block.experts is not None
            mixed, _ = block.experts.run(hidden, ids, weights, model.case.shape.activation)
            inputs.x.add_(mixed.mul_(model.case.shape.residual_scale))
    return parts.head(inputs.x)


def run_at_once(model: Tiny, inputs: DecodeInputs) -> tuple[torch.Tensor, Choices]:
    native = NativeModel(model.case.shape, model.blocks, model.final_norm, model.head)
    choices = PromptStep(native).run(inputs)
    return LayerParts(native).head(inputs.x), choices


PER_TOKEN = ("x", "cos", "sin", "kv_slots", "lengths")


def one_of(inputs: DecodeInputs, row: int) -> DecodeInputs:
    """One token's step."""
    assert inputs.starts is not None
    sequence = int(torch.searchsorted(inputs.starts, row, right=True)) - 1
    own = {name: getattr(inputs, name)[row : row + 1].clone() for name in PER_TOKEN}
    return replace(inputs, **own, page_table=inputs.page_table[sequence : sequence + 1].clone(), starts=None)


def chunk_of(inputs: DecodeInputs, begin: int, end: int) -> tuple[DecodeInputs, torch.Tensor]:
    """Tokens `begin` to `end` - 1 of every sequence that has them, and their rows."""
    assert inputs.starts is not None
    spans = [range(first, last)[begin:end] for first, last in pairwise(inputs.starts.tolist())]
    kept = [i for i, span in enumerate(spans) if span]
    rows = torch.tensor([row for span in spans for row in span])
    own = {name: getattr(inputs, name)[rows] for name in PER_TOKEN}
    starts = torch.tensor([*accumulate((len(spans[i]) for i in kept), initial=0)])
    return replace(inputs, **own, page_table=inputs.page_table[kept].contiguous(), starts=starts), rows


def copy_of(inputs: DecodeInputs) -> DecodeInputs:
    return replace(inputs, x=inputs.x.clone())


def take_keys(model: Tiny, inputs: DecodeInputs) -> list[torch.Tensor]:
    """What a step has written into the cache, which is empty then."""
    kept = [block.keys[:, inputs.kv_slots] for block in model.blocks]
    for block in model.blocks:
        block.keys.zero_()
    return kept


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_many_tokens_is_as_many_steps_of_one(name: str, rounds: bool) -> None:
    model = tiny(replace(CASES[name], rounds=rounds))
    inputs = tokens_of(model)
    several = run_layers(model, copy_of(inputs))
    kept = take_keys(model, inputs)
    step = model.step()
    one_by_one = [step.run(one_of(inputs, i))[0].clone() for i in range(len(inputs.x))]
    assert len(model.blocks) == LAYERS
    assert alike(torch.cat(one_by_one), several)
    assert all(alike(keys, before) for keys, before in zip(take_keys(model, inputs), kept, strict=True))
    logits, choices = run_at_once(model, copy_of(inputs))
    assert alike(logits, several)
    assert all(alike(keys, before) for keys, before in zip(take_keys(model, inputs), kept, strict=True))
    for ids, counts in zip(choices.ids, choices.counts, strict=True):
        assert counts.tolist() == ids.flatten().bincount(minlength=len(counts)).tolist()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [7, 64, 130])
@pytest.mark.parametrize("rounds", [False, True])
def test_chunks_change_no_bit(name: str, chunk: int, rounds: bool) -> None:
    model = tiny(replace(CASES[name], rounds=rounds))
    inputs = tokens_of(model)
    whole = run_layers(model, copy_of(inputs))
    take_keys(model, inputs)
    for begin in range(0, max(LENGTHS), chunk):
        part, rows = chunk_of(inputs, begin, begin + chunk)
        assert alike(run_layers(model, part), whole[rows])
