"""Attention with sinks: the sink as one more key, against the scores themselves, and what it takes in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_serve.execution.forward_batch import PrefillRun
from moe_serve.hf import sink_attention
from moe_serve.hf.attend import Attend

HEADS, KEY_HEADS, DIM = 8, 2, 16


def random_run(count: int, context: int, rows_per_head: int) -> tuple[torch.Tensor, ...]:
    """query, keys, values, mask, sinks in float64; heads of keys are repeated where a head has `count` rows."""
    heads = HEADS // rows_per_head if rows_per_head > 1 else HEADS
    rows = rows_per_head if rows_per_head > 1 else count
    query = torch.randn(1, heads, rows, DIM, dtype=torch.float64)
    keys, values = torch.randn(2, 1, heads, context, DIM, dtype=torch.float64)
    hidden = torch.ones(rows, context).triu(context - rows + 1).bool()
    mask = torch.zeros(rows, context, dtype=torch.float64).masked_fill_(hidden, float("-inf"))
    return query, keys, values, mask, torch.randn(HEADS, dtype=torch.float64) * 4


@pytest.mark.parametrize(("count", "context", "rows_per_head"), [(5, 5, 1), (3, 40, 1), (1, 17, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_sink_is_one_more_key(
    count: int, context: int, rows_per_head: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    query, keys, values, mask, sinks = (t.to(dtype) for t in random_run(count, context, rows_per_head))
    exact = [t.double() for t in (query, keys, values, mask)]
    expected = sink_attention.by_scores(exact[0], exact[1], exact[2], exact[3], 0.3, sinks.double())
    got = sink_attention.by_key(query, keys, values, mask, 0.3, sinks)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return out


@pytest.mark.parametrize("window", [None, 128])
def test_a_prompt_of_gpt_oss_never_holds_its_scores(window: int | None) -> None:
    """64 heads, 2,048 tokens at a context of 32,768: the scores in float32 would be 16 GiB."""
    count, context = 2048, 32768
    sizes = (64, count, 64), (64, context, 64), (64,)
    query, keys, sinks = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in sizes)
    run = PrefillRun(0, context - count, context, torch.empty(context // 16, dtype=torch.int64, device="meta"))
    attend = Attend(0.125, window, sinks)
    with torch.inference_mode(), Largest() as largest:
        out = attend.attend_to_context(query, keys, keys, run)
    assert out.shape == (count, 64, 64)
    assert 0 < largest.num_bytes < 512 << 20


@pytest.mark.parametrize("window", [3, 8, 100])
def test_keys_outside_the_window_are_left_out(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    run = PrefillRun(0, 20, 26, torch.zeros(2, dtype=torch.int64))
    query = torch.randn(HEADS, 6, DIM)
    keys, values = torch.randn(2, HEADS, 26, DIM)
    attend = Attend(None, window, torch.randn(HEADS))
    expected = attend.attend_to_context(query, keys, values, run)
    first = attend._first_seen(run, torch.device("cuda"))
    assert first == max(0, 21 - window)
    monkeypatch.setattr(Attend, "_first_seen", lambda *_: first)
    torch.testing.assert_close(attend.attend_to_context(query, keys, values, run), expected)
