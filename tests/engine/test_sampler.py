"""Sampler: each parameter does what it says, rows do not influence each other, seeds repeat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_serve.execution import sampler
from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence

NO_EOS: frozenset[int] = frozenset()


def seq(
    prompt: SequenceOf[int] = (1,),
    generated: SequenceOf[int] = (),
    index: int = 0,
    request_id: str = "r",
    **params: Any,
) -> Sequence:
    request = Request(request_id, tuple(prompt), SamplingParams(**params))
    return Sequence(request, index, [*prompt, *generated], 100)


def draw(logits: list[list[float]], seqs: list[Sequence], eos: frozenset[int] = NO_EOS) -> list[int]:
    return sampler.sample(torch.tensor(logits), seqs, 0, eos)[0]


def frequencies(logits: list[float], count: int = 2000, **params: Any) -> Counter[int]:
    rows = [seq(request_id=str(i), **params) for i in range(count)]
    return Counter(draw([logits] * count, rows))


def test_greedy_takes_the_largest() -> None:
    assert draw([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], [seq(temperature=0), seq(temperature=0)]) == [1, 0]


def test_samples_follow_the_softmax_at_the_given_temperature() -> None:
    logits = [0.0, 1.0, 2.0]
    counts = frequencies(logits, temperature=2.0)
    weights = [math.exp(x / 2.0) for x in logits]
    for token, weight in enumerate(weights):
        assert counts[token] / 2000 == pytest.approx(weight / sum(weights), abs=0.04)


def test_top_k_top_p_and_min_p_exclude_the_tail() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(frequencies(logits, top_k=2)) == {0, 1}
    assert set(frequencies(logits, top_p=0.81)) == {0, 1, 2}
    assert set(frequencies(logits, top_p=0.4)) == {0}
    assert set(frequencies(logits, min_p=0.2)) == {0, 1, 2}


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    counts = frequencies(logits, top_p=0.6)
    assert set(counts) == {0, 1}
    assert counts[0] / 2000 == pytest.approx(0.625, abs=0.04)


def test_mixed_rows_keep_their_own_parameters() -> None:
    rows = [seq(temperature=0), seq(top_k=1), seq(logit_bias={2: 100.0}), seq(seed=3)]
    for _ in range(20):
        tokens = draw([[0.0, 2.0, 1.0]] * 4, rows)
        assert tokens[:3] == [1, 1, 2]


def test_a_seed_repeats_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50)
    alone = sampler.sample(logits[None], [seq(seed=7)], 0, NO_EOS)[0]
    others = [seq(request_id=str(i), top_p=0.9) for i in range(5)]
    together = sampler.sample(logits.repeat(6, 1), [*others, seq(seed=7, request_id="other")], 123, NO_EOS)[0]
    assert together[-1] == alone[0]


def test_samples_positions_and_requests_differ() -> None:
    flat = [0.0] * 1000
    assert len({draw([flat], [seq(seed=1, index=i)])[0] for i in range(20)}) > 15
    assert len({draw([flat], [seq(seed=1, generated=[5] * i)])[0] for i in range(20)}) > 15
    assert len({draw([flat], [seq(request_id=f"r{i}")])[0] for i in range(20)}) > 15


def test_penalties() -> None:
    logits = [[1.0, 1.05, 0.0]]
    assert draw(logits, [seq(prompt=(0,), generated=(1,), temperature=0, presence_penalty=0.5)]) == [0]
    assert draw(logits, [seq(prompt=(1,), temperature=0, presence_penalty=0.5)]) == [1]
    assert draw(logits, [seq(prompt=(1,), temperature=0, repetition_penalty=1.5)]) == [0]
    twice = seq(prompt=(2,), generated=(1, 1), temperature=0, frequency_penalty=0.03)
    assert draw(logits, [twice]) == [0]


def test_min_tokens_forbids_eos_and_stop_ids_only_as_long_as_needed() -> None:
    logits = [[3.0, 2.0, 1.0]]
    params: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (1,)}
    assert draw(logits, [seq(**params)], frozenset({0})) == [2]
    assert draw(logits, [seq(generated=(9, 9), **params)], frozenset({0})) == [0]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    tokens, logprobs = sampler.sample(logits, [seq(temperature=0, logit_bias={0: 50.0}, logprobs=2)], 0, NO_EOS)
    expected = logits[0].log_softmax(-1).tolist()
    assert tokens == [0]
    assert logprobs[0] is not None
    assert logprobs[0].logprob == pytest.approx(expected[0])
    assert [t for t, _ in logprobs[0].top] == [2, 1]
    assert logprobs[0].top[0][1] == pytest.approx(expected[2])


def test_no_probability_zero_token_is_ever_drawn() -> None:
    logits = [-math.inf] * 10 + [0.0] + [-math.inf] * 10
    assert set(frequencies(logits, count=500)) == {10}


def test_what_others_cut_off_changes_no_row() -> None:
    """Each request alone and beside others with other limits: the same token, also where nothing is cut off."""
    torch.manual_seed(2)
    logits = torch.randn(60, 3000) * 3
    ways: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.5}, {"min_p": 0.01}]
    rows = [seq(seed=i, request_id=str(i), **ways[i % len(ways)]) for i in range(len(logits))]
    alone = [sampler.sample(logits[i : i + 1], [row], 0, NO_EOS)[0][0] for i, row in enumerate(rows)]
    assert sampler.sample(logits, rows, 0, NO_EOS)[0] == alone


class _Sorted(TorchDispatchMode):
    """Notes the most entries of a row that an operation puts in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "topk":
            self.most = max(self.most, args[1])
        if name in ("sort", "argsort", "msort", "_unique2"):
            self.most = max(self.most, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def test_the_vocabulary_is_never_sorted() -> None:
    torch.manual_seed(1)
    ways: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 3000}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.1}]
    rows = [seq(seed=i, request_id=str(i), logprobs=3, **way) for i, way in enumerate(ways)]
    with _Sorted() as noted:
        sampler.sample(torch.randn(len(rows), 5000), rows, 0, NO_EOS)
    assert noted.most <= sampler.MOST_SORTED


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9), (0, 1e-6), (0, 0.999999), (2000, 1.0), (2000, 0.7), (4999, 0.5)]
)
def test_what_is_kept_without_sorting_is_what_sorting_keeps(top_k: int, top_p: float) -> None:
    torch.manual_seed(3)
    probs = torch.softmax(torch.randn(4, 5000) * torch.tensor([[0.1], [1.0], [3.0], [9.0]]), -1)
    params = [SamplingParams(top_k=top_k, top_p=top_p)] * 4
    got = sampler._best_of_many(probs, params)
    order = torch.sort(probs.double(), dim=-1, descending=True, stable=True)
    kept = order.values.clone()
    kept[:, top_k or 5000 :] = 0
    before = kept.cumsum(-1) - kept
    kept[:, 1:] = torch.where(before >= top_p * kept.sum(-1, keepdim=True), 0.0, kept)[:, 1:]
    expected = torch.zeros_like(probs).scatter_(1, order.indices, kept.float())
    assert torch.equal(got, expected)


def test_of_equals_the_first_are_kept() -> None:
    probs = torch.full((1, 2000), 1 / 2000)
    assert sampler._best_of_many(probs, [SamplingParams(top_p=0.25)])[0].nonzero().flatten().tolist() == list(
        range(500)
    )
    assert sampler._best_of_many(probs, [SamplingParams(top_k=1500)])[0].nonzero().numel() == 1500


def test_equal_probabilities_of_the_best_do_not_depend_on_others() -> None:
    logits = torch.zeros(2, 4000)
    few, many = seq(temperature=0, logprobs=2), seq(temperature=0, logprobs=20)
    alone = sampler.sample(logits[:1], [few], 0, NO_EOS)[1][0]
    assert sampler.sample(logits, [few, many], 0, NO_EOS)[1][0] == alone
