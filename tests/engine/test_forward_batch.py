"""ForwardBatch: the plan's integers arrive where the model and the attention look for them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import torch

from moe_serve.execution import forward_batch
from moe_serve.execution.forward_batch import GroupLimits
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence

from .driving import MakeSeq

CPU = torch.device("cpu")


def scheduled(make_seq: MakeSeq, tokens: Iterable[int], pages: list[int], start: int, count: int) -> ScheduledSequence:
    seq = make_seq(tokens)
    seq.page_ids = pages
    return ScheduledSequence(seq, start, count)


def test_decodes_first_by_length_then_prefills(make_seq: MakeSeq) -> None:
    prefill = scheduled(make_seq, range(10, 16), [4, 5], 0, 6)
    long = scheduled(make_seq, range(20, 29), [1, 2, 6], 8, 1)
    short = scheduled(make_seq, range(30, 35), [3, 7], 4, 1)
    batch = forward_batch.make(BatchPlan((prefill, long, short)), 4, CPU, GroupLimits())
    assert batch.input_ids[0].tolist() == [34, 28, *range(10, 16)]
    assert batch.positions[0].tolist() == [4, 8, *range(6)]
    assert batch.kv_slots.tolist() == [7 * 4, 6 * 4, 16, 17, 18, 19, 20, 21]
    assert batch.sample_rows.tolist() == [0, 1, 7]
    assert batch.sample_order == (2, 1, 0)
    (group,) = batch.decode_groups
    assert group.page_table.tolist() == [[3, 7, 0], [1, 2, 6]]
    assert group.lengths.tolist() == [5, 9]
    assert not group.even
    (run,) = batch.prefill_runs
    assert (run.first_row, run.start, run.end, run.pages.tolist()) == (2, 0, 6, [4, 5])


def test_pages_are_read_where_they_are(make_seq: MakeSeq) -> None:
    """A table of N pages costs no Python per page; and an array that was read can still grow."""
    item = scheduled(make_seq, range(9), [4, 1, 2], 8, 1)
    pages = item.seq.page_ids = array("q", item.seq.page_ids)
    assert np.shares_memory(forward_batch._pages_of(item), np.frombuffer(pages, dtype=np.int64))
    batch = forward_batch.make(BatchPlan((item,)), 4, CPU, GroupLimits())
    pages.append(7)
    assert batch.decode_groups[0].page_table.tolist() == [[4, 1, 2]]


def test_a_chunk_that_does_not_reach_the_end_is_not_sampled(make_seq: MakeSeq) -> None:
    chunk = scheduled(make_seq, range(9), [0, 1, 2], 0, 8)
    batch = forward_batch.make(BatchPlan((chunk,)), 4, CPU, GroupLimits())
    assert batch.sample_rows.tolist() == []
    assert batch.prefill_runs[0].pages.tolist() == [0, 1]


def test_groups_are_cut_where_padding_or_size_exceeds_the_limits() -> None:
    pages = [2, 2, 3, 40, 41]
    assert forward_batch._group_ends(pages, 4, GroupLimits()) == [5]
    assert forward_batch._group_ends(pages, 4, GroupLimits(max_padding=1.25)) == [3, 5]
    assert forward_batch._group_ends(pages, 4, GroupLimits(max_tokens=200)) == [3, 4, 5]
    assert forward_batch._group_ends([], 4, GroupLimits()) == []


def test_consecutive_pages_of_a_single_sequence_are_one_run(make_seq: MakeSeq) -> None:
    def run_of(pages: list[int]) -> int | None:
        item = scheduled(make_seq, range(9), pages, 8, 1)
        return forward_batch.make(BatchPlan((item,)), 4, CPU, GroupLimits()).decode_groups[0].single_run

    assert run_of([5, 6, 7]) == 5
    assert run_of([5, 7, 6]) is None
