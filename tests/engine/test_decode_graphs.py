"""What a captured step reads: sizes, rows of sequences and of padding, and which plans a graph takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expert_cache.running.experts import PaddingRows
from moe_serve.execution.decode_graphs import LARGEST, DecodeGraphs, StepInputs, sizes_up_to, widths_up_to
from moe_serve.execution.forward_batch import DecodeGroup, ForwardBatch
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence

from .driving import MakeSeq

CPU = torch.device("cpu")
PAGE, SPARE, WIDTH = 4, 9, 3


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 4]), (20, [1, 2, 4, 8, 16, 20]), (24, [1, 2, 4, 8, 16, 24])],
)
def test_sizes(limit: int, expected: list[int]) -> None:
    assert sizes_up_to(limit) == expected


def test_there_is_a_largest_size() -> None:
    assert sizes_up_to(10_000)[-1] == LARGEST
    assert sizes_up_to(256) == sorted(set(sizes_up_to(256)))


def test_short_contexts_have_graphs_of_their_own_where_long_ones_can_be() -> None:
    assert widths_up_to(4096, 16) == [256]
    assert widths_up_to(8193, 16) == [256, 513]
    assert widths_up_to(100, 16) == [7]


def step(lengths: list[int], first_page: int = 0) -> ForwardBatch:
    """Sequences of so many tokens, on pages of their own."""
    count, width = len(lengths), -(-max(lengths) // PAGE)
    table = torch.arange(count * width).view(count, width) % SPARE + first_page
    ends = torch.tensor(lengths)
    return ForwardBatch(
        input_ids=10 + torch.arange(count)[None],
        positions=ends[None] - 1,
        kv_slots=table[torch.arange(count), (ends - 1) // PAGE] * PAGE + (ends - 1) % PAGE,
        decode_groups=(DecodeGroup(0, table, ends, max(lengths), even=False, single_run=None),),
        prefill_runs=(),
        sample_rows=torch.arange(count),
        sample_order=tuple(range(count)),
        page_size=PAGE,
    )


def test_rows_and_padding() -> None:
    """A long step first: nothing of it is left where the short one has padding."""
    inputs = StepInputs(4, WIDTH, PAGE, SPARE, CPU)
    batch = inputs.batch(4, WIDTH)
    inputs.write(step([12, 11, 10, 9]), 4)
    assert not bool(inputs.is_padding(4).any())
    short = step([6, 2])
    inputs.write(short, 4)
    group, (wanted,) = batch.decode_groups[0], short.decode_groups
    assert batch.input_ids.tolist() == [[10, 11, 0, 0]]
    assert batch.positions.tolist() == [[5, 1, 0, 0]]
    assert batch.kv_slots.tolist() == [*short.kv_slots.tolist(), SPARE * PAGE, SPARE * PAGE]
    assert group.lengths.tolist() == [6, 2, 1, 1]
    assert torch.equal(group.page_table[:2, :2], wanted.page_table)
    assert group.page_table[2:, 0].tolist() == [SPARE, SPARE]
    assert inputs.is_padding(4).tolist() == [[False], [False], [True], [True]]
    assert all(t.is_contiguous() for t in (group.lengths, batch.kv_slots))
    assert inputs.batch(4, 2).decode_groups[0].page_table.shape == (4, 2)


class _Copied(TorchDispatchMode):
    """Bytes of copies from one tensor into another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "copy_":
            self.most = max(self.most, args[0].nbytes)
        return func(*args, **(kwargs or {}))


def test_only_pages_that_are_there_are_copied() -> None:
    """In a graph for contexts of 500 pages, a step of two takes two columns to the GPU."""
    inputs = StepInputs(4, 500, PAGE, SPARE, CPU)
    batch, short = step([6, 2]), inputs.batch(4, 500).decode_groups[0]
    with _Copied() as copied:
        inputs.write(batch, 4)
    assert copied.most <= 4 * 4 * 8
    assert torch.equal(short.page_table[:2, :2], batch.decode_groups[0].page_table)


@torch.inference_mode()
def test_the_smallest_graph_that_holds_a_step() -> None:
    """With a capture that only calls: which work it was asked for, and what comes back."""
    captured: list[int] = []
    widths: list[int] = []

    def forward(batch: ForwardBatch) -> torch.Tensor:
        widths.append(batch.decode_groups[0].page_table.shape[1])
        return batch.input_ids[0, :, None].float()

    def capture(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        out = work()
        captured.append(len(out))

        def replay() -> None:
            out.copy_(work())

        return out, replay

    padding = PaddingRows()
    graphs = DecodeGraphs([1, 2, 4], [2, 3], StepInputs(4, WIDTH, PAGE, SPARE, CPU), forward, padding, capture)
    assert captured == [4, 2, 1, 4, 2, 1]
    assert widths == [3, 3, 3, 2, 2, 2]
    assert graphs.run(step([5, 6, 7])).tolist() == [[10.0], [11.0], [12.0]]
    assert graphs.run(step([5])).tolist() == [[10.0]]
    assert graphs.run(step([9])).tolist() == [[10.0]]
    assert widths[6:] == [2, 2, 3]
    assert padding.mask is None


def test_which_plans_are_taken(make_seq: MakeSeq) -> None:
    graphs = DecodeGraphs(
        [2],
        [WIDTH],
        StepInputs(2, WIDTH, PAGE, SPARE, CPU),
        lambda batch: batch.positions[0],
        PaddingRows(),
        lambda work: (work(), lambda: None),
    )

    def plan(*items: tuple[int, bool]) -> BatchPlan:
        """Of (tokens, whether they are the last ones of their sequence)."""
        seqs = [make_seq(range(count if is_last else count + 1)) for count, is_last in items]
        return BatchPlan(tuple(ScheduledSequence(seq, 0, count) for seq, (count, _) in zip(seqs, items, strict=True)))

    assert graphs.takes(plan((1, True)))
    assert graphs.takes(plan((1, True), (1, True)))
    assert not graphs.takes(plan((1, True), (1, True), (1, True)))
    assert not graphs.takes(plan((1, True), (5, True)))
    assert not graphs.takes(plan((1, False)))
