"""DecodeGraphs: a decoding step as one captured graph, for each of a set of batch sizes.

A step that decodes N sequences replays the graph of the smallest size that holds them (vLLM). Its other rows are
padding: they read and write a spare KV page, choose no expert, and their logits are dropped. A step's inputs go into
tensors that never move: two copies from pinned memory, then one launch for the whole model. Steps with a part of a
prompt, or with more sequences than the largest size, run without a graph.

Shape alphabet: N sequences, M rows of a graph (N <= M), W pages of the longest context, B page size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from expert_cache.running.experts import PaddingRows
from moe_serve.execution.cuda_graph import Capture
from moe_serve.execution.forward_batch import DecodeGroup, ForwardBatch
from moe_serve.scheduling.batch_plan import BatchPlan

LARGEST = 512
"""Rows beyond which launching costs little beside the work."""
SHORT_TOKENS = 4096
"""Attention is launched for the longest context that a graph can take: short ones get graphs of their own."""

Forward = Callable[[ForwardBatch], torch.Tensor]


def sizes_up_to(limit: int) -> list[int]:
    """Rows of the graphs: dense where a step is short, and `limit` itself (vLLM's choice)."""
    limit = min(limit, LARGEST)
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 16)]
    return sorted({size for size in steps if size < limit} | {limit})


def widths_up_to(max_model_len: int, page_size: int) -> list[int]:
    """Pages of the longest context of each graph."""
    longest, short = -(-max_model_len // page_size), -(-SHORT_TOKENS // page_size)
    return [short, longest] if longest > 2 * short else [longest]


class StepInputs:
    """What a graph reads, for up to `rows` sequences: tensors on the device and their image in host memory."""

    def __init__(self, rows: int, width: int, page_size: int, spare_page: int, device: torch.device) -> None:
        """`width`: W. `spare_page`: the page that padding rows read and write; no sequence has it."""
        pinned = device.type == "cuda"
        self._host = torch.zeros(4, rows, dtype=torch.int64, pin_memory=pinned)
        self._host_table = torch.zeros(rows, width, dtype=torch.int64, pin_memory=pinned)
        self._padding = torch.tensor([0, 0, spare_page * page_size, 1])[:, None]
        self._spare_page = spare_page
        self._page_size = page_size
        self._columns = torch.empty_like(self._host, device=device)
        self._staged = torch.empty(rows * width, dtype=torch.int64, device=device)
        self._table = torch.zeros_like(self._host_table, device=device)
        self._arange = torch.arange(rows, device=device)
        self.write(None, rows)

    def write(self, batch: ForwardBatch | None, rows: int) -> None:
        """Copy a decoding step (tensors on the CPU), and padding up to `rows`, to the device. None: padding only.

        The last step must be over on the device: its copies read the same host memory.
        """
        count, width = 0, 1
        if batch is not None:
            (group,) = batch.decode_groups
            count, width = group.page_table.shape
            columns = (batch.input_ids[0], batch.positions[0], batch.kv_slots, group.lengths)
            torch.stack(columns, out=self._host[:, :count])
        self._host[:, count:rows] = self._padding
        self._columns.copy_(self._host, non_blocking=True)
        # Only the pages that are there travel, in one piece; what is beyond them nobody reads.
        table = self._host_table.view(-1)[: rows * width].view(rows, width)
        if batch is not None:
            table[:count] = group.page_table
        table[count:, 0] = self._spare_page
        staged = self._staged[: rows * width].view(rows, width)
        staged.copy_(table, non_blocking=True)
        self._table[:rows, :width].copy_(staged)

    def batch(self, rows: int, width: int) -> ForwardBatch:
        """The first `rows` rows as a step of sequences of at most `width` pages; its tensors never move."""
        ids, positions, slots, lengths = self._columns[:, :rows]
        table = self._table[:rows, :width]
        group = DecodeGroup(0, table, lengths, width * self._page_size, even=False, single_run=None)
        return ForwardBatch(
            input_ids=ids[None],
            positions=positions[None],
            kv_slots=slots,
            decode_groups=(group,),
            prefill_runs=(),
            sample_rows=self._arange[:rows],
            sample_order=tuple(range(rows)),
            page_size=self._page_size,
        )

    def is_padding(self, rows: int) -> torch.Tensor:
        """[rows, 1] bool, computed on the device from what `write` has put there."""
        return (self._columns[2, :rows] >= self._spare_page * self._page_size)[:, None]


class DecodeGraphs:
    """The graphs of one model."""

    def __init__(
        self,
        sizes: list[int],
        widths: list[int],
        inputs: StepInputs,
        forward: Forward,
        padding: PaddingRows,
        capture: Capture,
    ) -> None:
        """Captures all of them, the largest first, so that the others fit into its memory.

        `sizes`: rows, ascending; `widths`: pages, ascending. `forward`: the model on a step -> logits [M, V], waiting
        for the device nowhere. `padding`: where its experts look for rows to leave out. RuntimeError: it waits.
        """
        self._inputs = inputs
        self._forward = forward
        self._padding = padding
        self._logits: torch.Tensor | None = None
        self.sizes = sizes
        self.widths = widths
        start = time.perf_counter()
        with torch.inference_mode():
            self._graphs = {key: capture(work) for key, work in self._works()}
        self.capture_s = time.perf_counter() - start

    def _works(self) -> Iterator[tuple[tuple[int, int], Callable[[], torch.Tensor]]]:
        for width in reversed(self.widths):
            for rows, fewer in reversed(list(zip(self.sizes, [0, *self.sizes], strict=False))):
                yield (rows, width), self._step(rows, width, may_be_padded=rows > fewer + 1)

    def _step(self, rows: int, width: int, may_be_padded: bool) -> Callable[[], torch.Tensor]:
        batch = self._inputs.batch(rows, width)

        def work() -> torch.Tensor:
            self._padding.mask = self._inputs.is_padding(rows) if may_be_padded else None
            try:
                return self._kept(self._forward(batch))
            finally:
                self._padding.mask = None

        return work

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """In one tensor for all graphs: they run one after the other, and each would keep its own alive."""
        if self._logits is None:
            self._logits = logits.new_empty(self.sizes[-1], *logits.shape[1:])
        return self._logits[: len(logits)].copy_(logits)

    def takes(self, plan: BatchPlan) -> bool:
        """Every sequence decodes in this step, and a graph is large enough for them and their drafts."""
        is_decoding = all(item.is_decoding and item.needs_sample for item in plan.scheduled)
        return is_decoding and plan.num_tokens <= self.sizes[-1]

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [N, V], valid until the next step, of a plan that `takes` takes. `batch`: tensors on the CPU."""
        rows = next(size for size in self.sizes if size >= batch.num_tokens)
        pages = batch.decode_groups[0].page_table.shape[1]
        width = next(width for width in self.widths if width >= pages)
        self._inputs.write(batch, rows)
        logits, replay = self._graphs[rows, width]
        replay()
        return logits[: batch.num_tokens]
