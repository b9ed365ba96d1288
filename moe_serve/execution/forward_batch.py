"""ForwardBatch: a BatchPlan as tensors. The one place where host integers become device tensors.

Knows page tables and token order; knows nothing of models, attention arithmetic or scheduling.
Shape alphabet: T tokens in the step, N sequences in a group, P pages, B page size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.sequence import Sequence

Value = TypeVar("Value")
Int64 = NDArray[np.int64]

MIN_GROUP_PAGES = 64
"""Below this many pages, padding is cheaper than one more attention call."""


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """How large a decode group may grow. The default is for attention that knows no padding."""

    max_tokens: float = float("inf")
    """KV tokens, padding included, that a group of several sequences may span."""
    max_padding: float = float("inf")
    """A group may span at most this many times the KV tokens it needs."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query token each, attended to in one call.

    Example, page size 4, contexts of 6 and 9 tokens on pages [3, 7] and [1, 2, 5]:
    page_table = [[3, 7, 0], [1, 2, 5]] (0 pads), lengths = [6, 9].
    """

    first_row: int
    """Row of the first sequence's token among the step's T tokens."""
    page_table: torch.Tensor
    """[N, max pages] int64; padded with page 0, which `lengths` keeps from being seen."""
    lengths: torch.Tensor
    """[N] int64: context length of each sequence, its own new token included."""
    max_length: int
    even: bool
    """True when all lengths are equal, so that no mask is needed."""
    single_run: int | None
    """First page, when N = 1 and its pages are consecutive: keys and values can be read in place."""
    masks: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    """Additive masks [N, 1, 1, max_length], made once per step and window or chunk, shared by layers."""

    @property
    def num_seqs(self) -> int:
        return self.page_table.shape[0]

    def singly(self) -> Iterator[DecodeGroup]:
        """Each sequence as a group of its own."""
        for i, length in enumerate(self.lengths.tolist()):
            table, lengths = self.page_table[i : i + 1], self.lengths[i : i + 1]
            yield DecodeGroup(self.first_row + i, table, lengths, length, even=True, single_run=None)


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """Several query tokens of one sequence: positions start .. end-1, context of `end` tokens."""

    first_row: int
    start: int
    end: int
    pages: torch.Tensor
    """[pages of the context] int64."""
    masks: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    """Additive masks [count, end], made once per step and window or chunk, shared by layers."""

    @property
    def count(self) -> int:
        return self.end - self.start

    def as_group(self) -> DecodeGroup:
        """A run of one token, as a decoding sequence."""
        assert self.count == 1
        lengths = torch.full((1,), self.end, dtype=torch.int64, device=self.pages.device)
        return DecodeGroup(self.first_row, self.pages[None], lengths, self.end, even=True, single_run=None)


@dataclass(frozen=True, slots=True)
class StateRun:
    """What a step does to a sequence's state with one of its runs (moe_serve/execution/state_cache.py)."""

    seat: int
    begins: bool
    """The run starts with the sequence's first token."""
    restored: int | None = None
    """Row of the saved state to go on from."""
    saved: int | None = None
    """Row to save the state in, once the run is computed."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All a model needs to run one step."""

    input_ids: torch.Tensor
    """[1, T] int64."""
    positions: torch.Tensor
    """[1, T] int64: position of each token in its own sequence."""
    kv_slots: torch.Tensor
    """[T] int64: page * B + offset, where each token's key and value are written."""
    decode_groups: tuple[DecodeGroup, ...]
    prefill_runs: tuple[PrefillRun, ...]
    sample_rows: torch.Tensor
    """[rows to sample] int64, in plan order; the order of StepResult."""
    sample_order: tuple[int, ...]
    """For each row of sample_rows, in batch order, its index in plan order."""
    page_size: int
    decode_starts: tuple[int, ...] | None = None
    """Rows with each decoding sequence's first token: with drafts it has several, each as a member of a decode group.
    None: every decoding sequence has one row."""
    state_runs: tuple[StateRun, ...] = ()
    """In batch order: of sequences with one token, then of each prefill run."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


def order_for_batch(plan: BatchPlan) -> list[ScheduledSequence]:
    """Decoding sequences first, by context length, so that equals sit together; then the others."""
    decodes = sorted((s for s in plan.scheduled if s.is_decoding), key=lambda s: s.end)
    return decodes + [s for s in plan.scheduled if not s.is_decoding]


def make(
    plan: BatchPlan, page_size: int, device: torch.device, limits: GroupLimits, state_block: int | None = None
) -> ForwardBatch:
    """Turn a non-empty plan into tensors on `device`. `state_block`: prompts are cut as `edges` says; None: they are
    not."""
    ordered = order_for_batch(plan)
    ids: list[int] = []
    for item in ordered:
        ids += item.token_ids
    positions, slots = _places(ordered, page_size)
    decoding = [item for item in ordered if item.is_decoding]
    num_rows = sum(item.count for item in decoding)
    rows, order = _sample_rows(plan, ordered)
    return ForwardBatch(
        input_ids=_int64([ids], device),
        positions=torch.from_numpy(positions).to(device)[None],
        kv_slots=torch.from_numpy(slots).to(device),
        decode_groups=tuple(_decode_groups(decoding, page_size, device, limits)),
        prefill_runs=tuple(_prefill_runs(ordered[len(decoding) :], num_rows, page_size, device, state_block)),
        sample_rows=_int64(rows, device),
        sample_order=tuple(order),
        page_size=page_size,
        decode_starts=_decode_starts(decoding) if num_rows > len(decoding) else None,
        state_runs=tuple(_state_runs(ordered, state_block)),
    )


def edges(item: ScheduledSequence, block: int | None) -> list[int]:
    """Where a run is cut, so that the bits of its results do not depend on how a scheduler cut the prompt: at whole
    blocks of it, at its end, and at each token behind that, which the model wrote one by one.

    Example: tokens 0 to 8 of a prompt of 7, in blocks of 4 -> [0, 4, 7, 8, 9].
    """
    if block is None:
        return [item.start, item.end]
    prompt_end = max(item.start, min(item.end, item.seq.num_prompt))
    blocks = range(item.start // block * block + block, prompt_end, block)
    return sorted({item.start, *blocks, *range(prompt_end, item.end + 1)})


def _state_runs(items: list[ScheduledSequence], block: int | None) -> Iterator[StateRun]:
    for item in items:
        rows = dict(item.saves)
        for start, end in pairwise(edges(item, block)):
            restored = item.restored if start == item.start else None
            yield StateRun(item.seq.seat, start == 0, restored, rows.get(end))


def rows_of(plan: BatchPlan) -> tuple[slice, ...]:
    """Where each scheduled sequence's tokens lie in the batch, in plan order."""
    found: dict[int, slice] = {}
    first = 0
    for item in order_for_batch(plan):
        found[id(item)] = slice(first, first + item.count)
        first += item.count
    return tuple(found[id(item)] for item in plan.scheduled)


def draft_rows(plan: BatchPlan) -> frozenset[int]:
    """Rows of drafts, which may turn out not to count."""
    if not plan.num_drafts:
        return frozenset()
    spans = zip(plan.scheduled, rows_of(plan), strict=True)
    return frozenset(row for item, span in spans for row in range(span.stop - len(item.drafts), span.stop))


def scored_rows(plan: BatchPlan) -> list[int]:
    """Rows whose logits tell log-probabilities of prompt tokens, in plan order."""
    if not any(item.seq.num_unscored for item in plan.scheduled):
        return []
    spans = zip(plan.scheduled, rows_of(plan), strict=True)
    return [span.start + position - item.start for item, span in spans for position in item.scored]


def by_sequence(plan: BatchPlan, rows: Mapping[int, Value]) -> dict[Sequence, Value]:
    """For each sequence of the plan with a token in `rows` (token row -> value), the first such value."""
    found: dict[Sequence, Value] = {}
    if not rows:
        return found
    for item, span in zip(plan.scheduled, rows_of(plan), strict=True):
        for row in range(span.start, span.stop):
            if row in rows:
                found.setdefault(item.seq, rows[row])
    return found


def _int64(values: list[int] | list[list[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _places(items: list[ScheduledSequence], page_size: int) -> tuple[Int64, Int64]:
    """[T] each token's position in its sequence, and the slot of its key and value."""
    positions = [np.arange(item.start, item.end) for item in items]
    pages = [_pages_of(item)[own // page_size] for item, own in zip(items, positions, strict=True)]
    flat = np.concatenate(positions)
    return flat, np.concatenate(pages) * page_size + flat % page_size


def _pages_of(item: ScheduledSequence) -> Int64:
    """Its pages. Of an array the same memory, which must not grow meanwhile."""
    return np.asarray(item.seq.page_ids, dtype=np.int64)


def _sample_rows(plan: BatchPlan, ordered: list[ScheduledSequence]) -> tuple[list[int], list[int]]:
    """Rows whose logits are wanted (in batch order), and which of the plan's positions each is."""
    first_index: dict[int, int] = {}
    count = 0
    for item in plan.scheduled:
        if item.needs_sample:
            first_index[id(item.seq)] = count
            count += 1 + len(item.drafts)
    rows: list[int] = []
    order: list[int] = []
    row = 0
    for item in ordered:
        row += item.count
        if item.needs_sample:
            rows += range(row - 1 - len(item.drafts), row)
            order += range(first_index[id(item.seq)], first_index[id(item.seq)] + 1 + len(item.drafts))
    return rows, order


def _decode_starts(decoding: list[ScheduledSequence]) -> tuple[int, ...]:
    return tuple(accumulate((item.count for item in decoding[:-1]), initial=0))


def _decode_groups(
    items: list[ScheduledSequence], page_size: int, device: torch.device, limits: GroupLimits
) -> list[DecodeGroup]:
    groups = []
    first = 0
    rows = [(item, end) for item in items for end in range(item.start + 1, item.end + 1)]
    for last in _group_ends([-(-end // page_size) for _, end in rows], page_size, limits):
        groups.append(_decode_group(rows[first:last], first, page_size, device))
        first = last
    return groups


def _group_ends(num_pages: list[int], page_size: int, limits: GroupLimits) -> list[int]:
    """Cut page counts, which ascend from sequence to sequence, into groups of bounded size and padding.

    Example: [2, 2, 3, 40, 41] and max_padding 1.25 -> [3, 5]: a group of four would span 4 x 40
    pages where 47 are needed.
    """
    ends = []
    first, used, most = 0, 0, 0
    for i, pages in enumerate(num_pages):
        most = max(most, pages)
        padded = (i - first + 1) * most
        wasteful = padded > MIN_GROUP_PAGES and padded > limits.max_padding * (used + pages)
        if i > first and (wasteful or padded * page_size > limits.max_tokens):
            ends.append(i)
            first, used, most = i, 0, pages
        used += pages
    if num_pages:
        ends.append(len(num_pages))
    return ends


def _decode_group(
    rows: list[tuple[ScheduledSequence, int]], first_row: int, page_size: int, device: torch.device
) -> DecodeGroup:
    """`rows`: sequences, and what each row of theirs sees of them."""
    lengths = [length for _, length in rows]
    width = -(-max(lengths) // page_size)
    table = np.zeros((len(rows), width), dtype=np.int64)
    for row, (item, _) in zip(table, rows, strict=True):
        pages = _pages_of(item)[:width]
        row[: len(pages)] = pages
    return DecodeGroup(
        first_row=first_row,
        page_table=torch.from_numpy(table).to(device),
        lengths=_int64(lengths, device),
        max_length=max(lengths),
        even=min(lengths) == max(lengths),
        single_run=_single_run(table),
    )


def _single_run(table: Int64) -> int | None:
    first = int(table[0, 0])
    if len(table) > 1 or not np.array_equal(table[0], np.arange(first, first + table.shape[1])):
        return None
    return first


def _prefill_runs(
    items: list[ScheduledSequence], first_row: int, page_size: int, device: torch.device, block: int | None
) -> Iterator[PrefillRun]:
    for item in items:
        for start, end in pairwise(edges(item, block)):
            pages = torch.tensor(_pages_of(item)[: -(-end // page_size)], device=device)  # a copy
            yield PrefillRun(first_row, start, end, pages)
            first_row += end - start
