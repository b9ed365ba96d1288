"""ExpertCache against a plain loop in float64: every form, every layout, every budget, odd routings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from expert_cache import forms, resident
from expert_cache.activations import clamped_gate, silu_gate
from expert_cache.cache import ExpertCache
from expert_cache.forms import FormRules
from expert_cache.regroup import regroup
from expert_cache.resident import ResidentExperts
from expert_cache.store import ExpertStore, FusedLayout

CPU = torch.device("cpu")
E, H, INNER = 5, 24, 12
RULES = {
    "columns": FormRules(1 << 30, 4),
    "rows": FormRules(0, forms.NEVER),
    "packed": FormRules(0, 1),
    "mixed": FormRules(0, 3),
}


class Config:
    hidden_act = "silu"
    swiglu_alpha = 1.5
    swiglu_limit = 2.0


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(E, INNER, H, generator=generator) * 0.3 for _ in range(2))
    return gate, up, torch.randn(E, H, INNER, generator=generator) * 0.3


def split_store(dtype=torch.float32) -> ExpertStore:
    gate, up, down = (m.to(dtype) for m in matrices())
    parts = {}
    for e in range(E):
        parts |= {("gate", e): gate[e], ("up", e): up[e], ("down", e): down[e]}
    return ExpertStore({3: parts}, E)


def fused_store() -> ExpertStore:
    gate, up, down = matrices()
    return ExpertStore({3: {("gate_up", None): torch.cat([gate, up], 1), ("down", None): down}}, E)


def gpt_oss_store() -> ExpertStore:
    """Transposed, interleaved, with biases."""
    gate, up, down = matrices()
    gate_up = torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous()
    parts = {
        ("gate_up", None): gate_up,
        ("down", None): down.transpose(1, 2).contiguous(),
        ("gate_up_bias", None): torch.arange(E * 2 * INNER).view(E, 2 * INNER) * 0.01,
        ("down_bias", None): torch.arange(E * H).view(E, H) * 0.01,
    }
    return ExpertStore({3: parts}, E, FusedLayout(transposed=True, interleaved=True))


def expected(store, gate, hidden, ids, weights) -> torch.Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t in range(hidden.shape[0]):
        for k in range(ids.shape[1]):
            w = store.weights(3, int(ids[t, k]))
            biases = [None if b is None else b.double() for b in (w.gate_bias, w.up_bias, w.down_bias)]
            x = hidden[t].double()
            inner = gate(F.linear(x, w.gate.double(), biases[0]), F.linear(x, w.up.double(), biases[1]))
            out[t] += weights[t, k].double() * F.linear(inner, w.down.double(), biases[2])
    return out


def routing(tokens, choices=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:choices] for _ in range(tokens)])
    return torch.randn(tokens, H, generator=generator), ids, torch.rand(tokens, choices, generator=generator)


def cache_of(store, gate, rules, budget=1 << 30, dtype=torch.float32) -> ExpertCache:
    return ExpertCache(ResidentExperts(store, gate, rules, dtype, CPU, budget))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("make_store", [split_store, fused_store, gpt_oss_store])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_every_form_and_layout_matches_a_plain_loop(rules, make_store, tokens) -> None:
    store = make_store()
    gate = (clamped_gate if make_store is gpt_oss_store else silu_gate)(Config())
    cache = cache_of(store, gate, RULES[rules])
    inputs = routing(tokens)
    for _ in range(2):  # the second time from resident forms
        torch.testing.assert_close(cache.run(3, *inputs).double(), expected(store, gate, *inputs), rtol=0, atol=2e-5)
    cache.resident.check_integrity()
    assert cache.resident.num_hits > 0


def test_all_tokens_to_one_expert() -> None:
    store, gate = split_store(), silu_gate(Config())
    hidden, _, weights = routing(9, choices=1)
    ids = torch.full((9, 1), 4)
    got = cache_of(store, gate, RULES["mixed"]).run(3, hidden, ids, weights)
    torch.testing.assert_close(got.double(), expected(store, gate, hidden, ids, weights), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 40])
def test_bf16_weights_under_float32_activations(tokens) -> None:
    store, gate = split_store(torch.bfloat16), silu_gate(Config())
    cache = cache_of(store, gate, RULES["rows"], budget=0)
    inputs = routing(tokens)
    torch.testing.assert_close(cache.run(3, *inputs).double(), expected(store, gate, *inputs), rtol=0, atol=2e-5)
    assert cache.resident.used_bytes == 0


@pytest.mark.parametrize("experts_that_fit", [0, 1, 3])
def test_a_small_budget_changes_nothing_but_what_is_kept(experts_that_fit) -> None:
    store, gate = split_store(torch.bfloat16), silu_gate(Config())
    one = store.expert_elements * 4
    cache = cache_of(store, gate, RULES["columns"], budget=one * experts_that_fit + one // 2)
    inputs = routing(20)
    torch.testing.assert_close(cache.run(3, *inputs).double(), expected(store, gate, *inputs), rtol=0, atol=2e-5)
    cache.resident.check_integrity()
    assert cache.resident.num_resident == experts_that_fit


def test_rows_of_a_matching_checkpoint_are_views() -> None:
    cache = cache_of(split_store(), silu_gate(Config()), RULES["rows"], budget=0)
    cache.run(3, *routing(8))
    assert cache.resident.used_bytes == 0
    assert cache.resident.num_resident == E


def test_bytes_for_everything_is_what_a_full_cache_uses() -> None:
    store = split_store(torch.bfloat16)
    for rules in RULES.values():
        needed = resident.bytes_for_everything(store, rules, torch.float32, CPU)
        cache = cache_of(store, silu_gate(Config()), rules, budget=needed)
        for tokens in (1, 40):
            cache.run(3, *routing(tokens, choices=E))
        assert cache.resident.used_bytes == needed


def test_bf16_stays_within_its_rounding() -> None:
    store, gate = split_store(torch.bfloat16), silu_gate(Config())
    hidden, ids, weights = routing(6)
    hidden = hidden.bfloat16()
    got = cache_of(store, gate, RULES["rows"], dtype=torch.bfloat16).run(3, hidden, ids, weights)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected(store, gate, hidden, ids, weights), rtol=0.02, atol=0.03)


def test_regroup_example_of_its_docstring() -> None:
    groups = regroup(torch.tensor([[2, 0], [0, 1], [2, 1]]), 3)
    assert groups.pairs.tolist() == [1, 2, 3, 5, 0, 4]
    assert groups.tokens.tolist() == [0, 1, 1, 2, 0, 2]
    assert list(groups.segments()) == [(0, 0, 2), (1, 2, 4), (2, 4, 6)]


def test_unknown_activation_is_an_error_that_lists_the_known_ones() -> None:
    class Odd:
        hidden_act = "quick_gelu"

    with pytest.raises(ValueError, match=r"quick_gelu.*silu"):
        silu_gate(Odd())
