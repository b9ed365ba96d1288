"""Recordings of SGLang and vLLM, in the shapes those systems write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from predictors.formats import from_sglang, from_vllm
from predictors.trace import RoutingTrace, TraceError


def test_vllm_rows_become_sequences(small_trace: RoutingTrace) -> None:
    rows = small_trace.ids.astype(np.int16)
    trace = from_vllm([rows[:3], rows[3:]], num_experts=4)
    np.testing.assert_array_equal(trace.ids, small_trace.ids)
    assert trace.seq_offsets.tolist() == [0, 3, 5]
    assert trace.layer_ids.tolist() == [0, 1]


@pytest.mark.parametrize("completions", [[], [np.zeros((3, 2))], [np.zeros((1, 2, 2)), np.zeros((1, 2, 3))]])
def test_vllm_rows_of_a_wrong_shape(completions: list[Any]) -> None:
    with pytest.raises(TraceError, match="routed_experts: routed_experts"):
        from_vllm(completions, num_experts=4)


def record(
    pass_id: int, positions: list[int], lengths: list[int] | None, rows: np.ndarray, rank: int = 0
) -> dict[str, Any]:
    """A pass over `rows` [tokens, 2, 2]; layers 0 and 2 are dense, and the recorder's buffer has room for K = 3."""
    ids = np.full((4, len(rows), 3), -1)
    ids[1, :, :2], ids[3, :, :2] = rows[:, 0], rows[:, 1]
    return {
        "forward_pass_id": pass_id,
        "rank": rank,
        "positions": positions,
        "extend_seq_lens": lengths,
        "topk_ids_of_layer": ids,
    }


def test_sglang_requests_are_told_apart_by_position(small_trace: RoutingTrace) -> None:
    """Two prompts of 2 and 1 tokens in one pass, then two decode passes; one request ends first."""
    rows = small_trace.ids.astype(np.int64)  # sequence 0 is rows 0 1 2, sequence 1 is rows 3 4
    records = [
        record(8, [2, 1], None, rows[[2, 4]]),
        record(7, [0, 1, 0], [2, 1], rows[[0, 1, 3]]),
        record(7, [0], [1], rows[[0]], rank=1),
        record(9, [], None, rows[:0]),
    ]
    trace = from_sglang({"records": records}, num_experts=4)
    np.testing.assert_array_equal(trace.ids, small_trace.ids)
    assert trace.seq_offsets.tolist() == [0, 3, 5]
    assert trace.layer_ids.tolist() == [1, 3]
    assert trace.top_k == 2


def test_sglang_requests_at_the_same_position_keep_their_order(small_trace: RoutingTrace) -> None:
    rows = small_trace.ids.astype(np.int64)
    records = [record(1, [0, 0], [1, 1], rows[[0, 3]]), record(2, [1, 1], None, rows[[1, 4]])]
    trace = from_sglang({"records": records}, num_experts=4)
    np.testing.assert_array_equal(trace.ids, small_trace.ids[[0, 1, 3, 4]])


def test_sglang_prefix_hits_start_a_request_in_the_middle(small_trace: RoutingTrace) -> None:
    rows = small_trace.ids.astype(np.int64)
    trace = from_sglang({"records": [record(1, [16, 17], [2], rows[:2]), record(2, [18], None, rows[2:3])]}, 4)
    assert trace.seq_offsets.tolist() == [0, 3]


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no records": ("records", {}),
    "statistics instead of tokens": ("records", {"records": [{"global_physical_count": 1}]}),
    "only empty passes": ("positions", {"records": [record(1, [], None, np.zeros((0, 2, 2)))]}),
    "lengths that do not add up": ("extend_seq_lens", {"records": [record(1, [0, 1], [3], np.zeros((2, 2, 2)))]}),
    "ids of another pass": ("topk_ids_of_layer", {"records": [record(1, [0, 1, 2], [3], np.zeros((2, 2, 2)))]}),
    "a dense model": ("topk_ids_of_layer", {"records": [record(1, [0], [1], np.full((1, 2, 2), -1))]}),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_dump_is_named_with_the_field(what: str) -> None:
    field, dump = BAD[what]
    with pytest.raises(TraceError, match=f"^d.pt: {field}: "):
        from_sglang(dump, num_experts=4, source="d.pt")
