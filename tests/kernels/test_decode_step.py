"""A whole decoding step against its definition in float64, and the step in one call against the step in parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import pytest
import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.decode_step import DecodeStep, most_tokens
from moe_serve_kernels.cpu.decoder import DecodeInputs, DecoderBlock, DecoderShape, Latents, Rotary
from moe_serve_kernels.cpu.expert_layer import ExpertLayer, combine
from moe_serve_kernels.cpu.expert_mlp import Activation, Matrix, MLPWeights, expert_mlp
from moe_serve_kernels.cpu.latent_heads import LatentHeads
from moe_serve_kernels.cpu.linear import LinearWeights
from moe_serve_kernels.cpu.native_model import NativeModel
from moe_serve_kernels.routings import Routing
from tests.kernels.quantized_experts import FORMS, Form, make_expert, make_matrix
from tests.kernels.test_blocks import random_rows
from tests.support.decode_reference import decode_step_reference, in_float64

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

SILU = Activation("silu")
LAYERS, EXPERTS, VOCAB, PAGE_SIZE, PAGES = 3, 8, 83, 4, 160


@dataclass(frozen=True)
class Case:
    """A model of three layers; every field differs from the default somewhere in CASES."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 48
    dtype: torch.dtype = torch.bfloat16
    rounds: bool = False
    """Keys and values in bf16, and tokens rounded to it where they meet weights."""
    routing: Routing = Routing(2, "softmax")  # noqa: RUF009
    correction: bool = False
    norms: str | None = None
    biases: bool = False
    sinks: bool = False
    window: int | None = None
    activation: Activation = SILU
    rotary_dim: int | None = None
    """None: the whole head."""
    rotary: Rotary = "halves"
    kv_rank: int = 0
    """Of latent attention; 0: none."""
    q_rank: int = 0
    value_dim: int | None = None
    residual_scale: float = 1.0
    shared: int = 0
    """Rows of the shared expert; 0: none."""
    shared_gate: bool = False
    dense: tuple[int, ...] = ()
    """Layers that have an MLP instead of experts."""
    forms: tuple[Form | str, ...] = ()
    """Of linear layers, drawn for each: quantised, or ggml's blocks by name. Empty: `dtype`."""

    @property
    def shape(self) -> DecoderShape:
        names = ("hidden", "heads", "kv_heads", "head_dim", "activation", "routing", "rotary", "residual_scale")
        return DecoderShape(
            **{name: getattr(self, name) for name in names},
            rotary_dim=self.rotary_dim or self.head_dim,
            value_dim=self.value_dim or self.head_dim,
            page_size=PAGE_SIZE,
            norm_eps=1e-5,
            latent_norm_eps=1e-2,
            attention_scale=0.2,
        )

    @property
    def key_dim(self) -> int:
        """Of what is cached."""
        return self.kv_rank + self.shape.rotary_dim if self.kv_rank else self.head_dim

    @property
    def routed_layers(self) -> list[int]:
        return [i for i in range(LAYERS) if i not in self.dense]


MIXED: tuple[Form | str, ...] = ("Q8_0", "Q5_1", "MXFP4", Form("int4", 32, zeros=True), Form("fp8"), Form("int8"))
CASES = {
    "mixtral": Case(routing=Routing(2, "softmax_of_chosen")),
    "qwen2": Case(routing=Routing(3, "softmax"), shared=90, shared_gate=True, dense=(1,)),
    "qwen3": Case(norms="head", routing=Routing(5, "softmax", True, 2.5), heads=8, kv_heads=1),
    "olmoe": Case(norms="all", kv_heads=4, dtype=torch.float32),
    "gpt_oss": Case(
        biases=True,
        sinks=True,
        window=5,
        activation=Activation("clamped_swiglu"),
        routing=Routing(4, "softmax_of_chosen"),
    ),
    "glm4": Case(
        routing=Routing(2, "sigmoid", True, 1.5, num_groups=4, top_groups=2),
        correction=True,
        rotary_dim=10,
        shared=48,
        dense=(0,),
    ),
    "sigmoid": Case(routing=Routing(3, "sigmoid")),
    "ernie": Case(
        routing=Routing(3, "softmax", True), correction=True, biases=True, rotary="neighbours", shared=96, dense=(0, 2)
    ),
    "deepseek_v2": Case(
        routing=Routing(3, "softmax", scaling=1.5, num_groups=4, top_groups=2, best_of_group=1), shared=48, dense=(0,)
    ),
    "deepseek_v2_lite": Case(
        routing=Routing(3, "softmax", scaling=1.5),
        heads=19,
        kv_heads=1,
        rotary="neighbours",
        rotary_dim=8,
        kv_rank=20,
        value_dim=12,
        shared=96,
        dense=(0,),
    ),
    "deepseek_v3": Case(
        routing=Routing(3, "sigmoid", True, 2.5, num_groups=4, top_groups=2),
        correction=True,
        kv_heads=1,
        rotary="neighbours_to_halves",
        rotary_dim=16,
        kv_rank=80,
        q_rank=80,
        value_dim=24,
        shared=48,
    ),
    "forms": Case(hidden=96, routing=Routing(3, "softmax"), forms=MIXED, biases=True, shared=48),
    "forms_of_latents": Case(
        routing=Routing(3, "softmax"), kv_heads=1, rotary_dim=16, kv_rank=48, q_rank=64, value_dim=24, forms=MIXED
    ),
    "granite": Case(routing=Routing(3, "softmax_of_chosen"), residual_scale=0.3, shared=16),
    "odd": Case(
        hidden=37,
        head_dim=6,
        intermediate=29,
        heads=6,
        kv_heads=3,
        routing=Routing(7, "softmax"),
        norms="all",
        biases=True,
        shared=31,
        shared_gate=True,
    ),
    "several_blocks_of_rows": Case(
        hidden=200, head_dim=64, intermediate=150, routing=Routing(3, "softmax"), shared=330
    ),
}


@dataclass
class Tiny:
    """The model of a case and a step of it."""

    case: Case
    blocks: list[DecoderBlock]
    final_norm: torch.Tensor
    head: LinearWeights

    def step(self) -> DecodeStep:
        return DecodeStep(NativeModel(self.case.shape, self.blocks, self.final_norm, self.head))

    def reference(self, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        copies = [with_own_cache(b) for b in self.blocks]
        return decode_step_reference(self.case.shape, copies, self.final_norm, self.head, in_float64(inputs))


def tiny(case: Case) -> Tiny:
    torch.manual_seed(case.hidden)
    blocks = [block(case, i) for i in range(LAYERS)]
    return Tiny(case, blocks, 1 + 0.2 * torch.randn(case.hidden), linear(case, VOCAB, case.hidden))


def block(case: Case, index: int) -> DecoderBlock:
    wide, narrow = case.heads * case.head_dim, case.kv_heads * case.head_dim
    norm_widths = {"all": (wide, narrow), "head": (case.head_dim, case.head_dim)}.get(case.norms or "")
    q_norm, k_norm = (1 + 0.2 * torch.randn(n) for n in norm_widths) if norm_widths else (None, None)
    attention = DecoderBlock(
        q=linear(case, wide, case.q_rank or case.hidden),
        k=None if case.kv_rank else linear(case, narrow, case.hidden),
        v=None if case.kv_rank else linear(case, narrow, case.hidden),
        latents=latents(case) if case.kv_rank else None,
        o=linear(case, case.hidden, case.heads * case.shape.value_dim),
        input_norm=1 + 0.2 * torch.randn(case.hidden),
        post_norm=1 + 0.2 * torch.randn(case.hidden),
        keys=kept(case, case.key_dim),
        values=None if case.kv_rank else kept(case, case.shape.value_dim),
        q_norm=q_norm,
        k_norm=k_norm,
        sinks=torch.randn(case.heads) if case.sinks else None,
        window=case.window,
    )
    if index in case.dense:
        return replace(attention, shared=mlp(case, 100))
    return replace(
        attention,
        router=LinearWeights(torch.randn(EXPERTS, case.hidden), torch.randn(EXPERTS) if case.biases else None),
        correction=0.5 * torch.randn(EXPERTS) if case.correction else None,
        experts=ExpertLayer([mlp(case, case.intermediate) for _ in range(EXPERTS)]),
        shared=mlp(case, case.shared) if case.shared else None,
        shared_gate=LinearWeights(torch.randn(1, case.hidden).to(case.dtype)) if case.shared_gate else None,
    )


def kept(case: Case, width: int) -> torch.Tensor:
    rows = torch.randn(case.kv_heads, PAGES * PAGE_SIZE, width)
    return rows.bfloat16() if case.rounds else rows


def with_own_cache(block: DecoderBlock) -> DecoderBlock:
    return replace(block, keys=block.keys.clone(), values=None if block.values is None else block.values.clone())


def latents(case: Case) -> Latents:
    shape, plain = case.shape, case.head_dim - case.shape.rotary_dim
    up = torch.randn(case.heads, plain + shape.value_dim, case.kv_rank) / case.kv_rank**0.5
    return Latents(
        kv=linear(case, case.kv_rank + shape.rotary_dim, case.hidden),
        kv_norm=1 + 0.2 * torch.randn(case.kv_rank),
        heads=LatentHeads(up.to(case.dtype), plain, case.rounds),
        q=linear(case, case.q_rank, case.hidden) if case.q_rank else None,
        q_norm=1 + 0.2 * torch.randn(case.q_rank) if case.q_rank else None,
    )


def linear(case: Case, rows: int, columns: int) -> LinearWeights:
    bias = torch.randn(rows).to(case.dtype) if case.biases else None
    if case.forms:
        return LinearWeights(
            coded(case.forms[int(torch.randint(len(case.forms), ()))], rows, columns), bias, case.rounds
        )
    return LinearWeights((torch.randn(rows, columns) / columns**0.5).to(case.dtype), bias, case.rounds)


def coded(form: Form | str, rows: int, columns: int) -> Matrix:
    generator = torch.Generator().manual_seed(rows)
    if isinstance(form, Form):
        return make_matrix(form, rows, columns, generator)
    return random_rows(form, rows, columns, generator)


def mlp(case: Case, inner: int) -> MLPWeights:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns) / columns**0.5
        return drawn.to(case.dtype)

    hidden = case.hidden
    biases = [torch.randn(n).to(case.dtype) if case.biases else None for n in (inner, inner, hidden)]
    return MLPWeights(matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner), *biases, rounds=case.rounds)


def inputs_of(case: Case, num_tokens: int) -> DecodeInputs:
    """Sequences of different lengths on shuffled pages, each token with a slot of its own."""
    torch.manual_seed(num_tokens)
    lengths = torch.arange(1, num_tokens + 1) * 4 - 1
    width = int(lengths[-1] + PAGE_SIZE - 1) // PAGE_SIZE
    table = torch.randperm(PAGES)[: num_tokens * width].view(num_tokens, width)
    last = lengths - 1
    slots = table[torch.arange(num_tokens), last // PAGE_SIZE] * PAGE_SIZE + last % PAGE_SIZE
    angles = torch.outer(last.float(), torch.rand(case.shape.rotary_dim // 2))
    return DecodeInputs(torch.randn(num_tokens, case.hidden), angles.cos(), angles.sin(), slots, table, lengths)


def copy_of(inputs: DecodeInputs) -> DecodeInputs:
    return replace(inputs, x=inputs.x.clone())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_tokens", range(1, 7))
def test_matches_float64(name: str, num_tokens: int) -> None:
    model = tiny(CASES[name])
    inputs = inputs_of(model.case, num_tokens)
    logits, ids, weights = model.reference(inputs)
    got_logits, got_ids, got_weights = model.step().run(copy_of(inputs))
    assert torch.equal(got_ids, ids)
    scaling = model.case.routing.scaling  # comes last and multiplies what was rounded
    torch.testing.assert_close(got_weights.double() / scaling, weights / scaling, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_logits.double(), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_rounded_to_bf16_it_stays_near(name: str) -> None:
    """Three layers in which what meets weights has 8 bits: logits of about 1, off by 3 % of that at most on average."""
    model = tiny(replace(CASES[name], rounds=True, dtype=torch.bfloat16))
    inputs = inputs_of(model.case, 3)
    logits, ids, _ = model.reference(inputs)
    got_logits, got_ids, _ = model.step().run(copy_of(inputs))
    rows = [row for row in range(3) if torch.equal(got_ids[:, row], ids[:, row])]  # a close call may go the other way
    assert rows
    assert (got_logits[rows].double() - logits[rows]).pow(2).mean().sqrt() < 0.03 * logits.pow(2).mean().sqrt()
    assert not torch.allclose(got_logits.double(), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_writes_keys_and_values_where_they_belong(name: str) -> None:
    model = tiny(CASES[name])
    inputs = inputs_of(model.case, 3)
    copies = [with_own_cache(b) for b in model.blocks]
    decode_step_reference(model.case.shape, copies, model.final_norm, model.head, in_float64(inputs))
    model.step().run(copy_of(inputs))
    for got, expected in zip(model.blocks, copies, strict=True):
        torch.testing.assert_close(got.keys, expected.keys, rtol=0, atol=1e-4)
        if got.values is not None:
            torch.testing.assert_close(got.values, expected.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_in_parts_the_bits_are_the_same(name: str, num_tokens: int) -> None:
    """Who brings experts runs them outside: what a cache holds must change nothing."""
    model = tiny(CASES[name])
    inputs = inputs_of(model.case, num_tokens)
    expected = model.step().run(copy_of(inputs))
    step = Tiny(model.case, [replace(b, experts=None) for b in model.blocks], model.final_norm, model.head).step()
    parts = copy_of(inputs)
    for i in range(LAYERS):
        hidden, ids, weights = step.until_experts(i, parts)
        if i in model.case.routed_layers:
            step.shared(i, parts)
            route = model.case.routed_layers.index(i)
            assert torch.equal(ids, expected[1][route])
            assert torch.equal(weights, expected[2][route])
            parts.x.add_(outside(model, i, hidden, ids, weights).mul_(model.case.residual_scale))
    assert torch.equal(step.head(parts), expected[0])


def outside(model: Tiny, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One layer's experts, as HostManagedExperts run them."""
    order = ids.flatten().argsort(stable=True)
    sorted_ids = ids.flatten()[order].tolist()
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(sorted_ids), 1) if a != b), len(sorted_ids)]
    out = torch.empty(ids.numel(), model.case.hidden)
    in_place = model.blocks[layer].experts
    assert in_place is not None
    experts = [in_place.experts[sorted_ids[start]] for start in starts[:-1]]
    expert_mlp(hidden, order // ids.shape[1], list(pairwise(starts)), experts, model.case.activation, out)
    return combine(torch.empty_like(out).index_copy_(0, order, out), weights)


@pytest.mark.parametrize("kv_rank", [0, 48])
def test_the_number_of_threads_changes_no_bit(kv_rank: int) -> None:
    wide = Case(
        hidden=512, heads=12, kv_heads=1, head_dim=64, intermediate=300, shared=700, kv_rank=kv_rank, rotary_dim=16
    )
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        model = tiny(wide)
        results.append(model.step().run(inputs_of(wide, 3)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantised_experts(form: Form) -> None:
    case = Case(hidden=256, intermediate=128)
    model = tiny(case)
    quantised = [make_expert(form, case.hidden, case.intermediate, seed) for seed in range(EXPERTS)]
    model.blocks = [replace(b, experts=ExpertLayer(quantised)) for b in model.blocks]
    inputs = inputs_of(case, 2)
    expected = model.reference(inputs)[0]
    torch.testing.assert_close(model.step().run(copy_of(inputs))[0].double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("routing", [Routing(3, "softmax"), CASES["deepseek_v2"].routing], ids=str)
def test_the_first_of_equal_scores_is_chosen(routing: Routing) -> None:
    model = tiny(Case(routing=routing))
    for b in model.blocks:
        assert b.router is not None
        assert isinstance(b.router.weight, torch.Tensor)
        b.router.weight.zero_()
    _, ids, weights = model.step().run(inputs_of(model.case, 2))
    assert ids.tolist() == [[[0, 1, 2]] * 2] * LAYERS
    torch.testing.assert_close(weights, torch.full_like(weights, routing.scaling / EXPERTS))


@pytest.mark.parametrize(("best_of_group", "chosen"), [(1, [2, 3]), (2, [0, 1])])
def test_a_group_is_worth_its_best(best_of_group: Literal[1, 2], chosen: list[int]) -> None:
    model = tiny(Case(routing=Routing(2, "softmax", num_groups=4, top_groups=1, best_of_group=best_of_group)))
    scores = torch.tensor([1.0, 0.9, 1.2, -2.0, 0.1, 0.2, 0.3, 0.4])
    router = LinearWeights(torch.zeros(EXPERTS, model.case.hidden), scores)
    model.blocks = [replace(b, router=router) for b in model.blocks]
    _, ids, weights = model.step().run(inputs_of(model.case, 2))
    assert ids.tolist() == [[chosen] * 2] * LAYERS
    torch.testing.assert_close(weights, scores.softmax(0)[chosen].expand_as(weights))


def test_nan_stays_in_its_own_sequence() -> None:
    model = tiny(Case())
    inputs = inputs_of(model.case, 3)
    clean = model.step().run(copy_of(inputs))[0].clone()
    inputs.x[1] = torch.nan
    logits = model.step().run(inputs)[0]
    assert logits[1].isnan().all()
    torch.testing.assert_close(logits[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("routing", [Routing(5, "softmax"), Routing(5, "sigmoid", num_groups=4, top_groups=3)], ids=str)
def test_nan_everywhere_still_chooses_different_experts(routing: Routing) -> None:
    """An expert that one token had twice would have more pairs than there is memory for."""
    model = tiny(Case(routing=routing, correction=True))
    inputs = inputs_of(model.case, most_tokens())
    inputs.x.fill_(torch.nan)
    logits, ids, _ = model.step().run(inputs)
    assert logits.isnan().all()
    assert all(len(set(chosen)) == 5 for layer in ids.tolist() for chosen in layer)
