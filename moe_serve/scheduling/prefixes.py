"""Prefixes: what sequences that begin alike share. Pages of keys and values, and states where layers are recurrent.

With states, one rule makes a hit give the bits of a run without it. States are computed in *blocks* of a fixed number
of tokens, counted from the prompt's beginning, and saved at the ends of blocks only. Tokens that the model wrote itself
went through other kernels than a prompt's, so their pages are not offered to other prompts.

Knows pages, rows and hashes; knows no tensors and no queues.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_serve.scheduling.batch_plan import SavedAt, ScheduledSequence
from moe_serve.scheduling.kv_pages import PagePool, page_hash
from moe_serve.scheduling.saved_states import SavedStates
from moe_serve.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What of a sequence need not be computed."""

    pages: list[int]
    row: int | None = None
    """Of the saved state at the end of these pages; None: there is none, or the model has no states."""


NOTHING = CachedPrefix([])


class Prefixes:
    """Finds and publishes cached prefixes."""

    def __init__(self, pool: PagePool, is_on: bool, state_block: int | None = None, num_saved_states: int = 0) -> None:
        """`state_block`: tokens in a block; None: the model has no states. A multiple of the page size if `is_on`."""
        assert not is_on or state_block is None or state_block % pool.page_size == 0
        self._pool = pool
        self.is_on = is_on
        self.block = state_block
        """Tokens whose states are computed at once, or None."""
        self.saved = SavedStates(num_saved_states)
        self._pending: dict[Sequence, tuple[SavedAt, ...]] = {}
        """States that the step under way saves."""
        self._shared_until: dict[Sequence, int] = {}
        """Tokens of a running sequence whose pages another one had filled, without a state to go on from."""

    def find(self, seq: Sequence) -> CachedPrefix:
        """The longest cached prefix; the last token, and what has to be scored, is left to compute."""
        if not self.is_on:
            return NOTHING
        pages = self._pool.match(self.usable_hashes(seq))
        return CachedPrefix(pages) if self.block is None else self._with_state(seq, pages, self.block)

    def usable_hashes(self, seq: Sequence) -> list[bytes]:
        """Of the pages that a sequence could take over, if they were there."""
        self._extend_hashes(seq, seq.num_tokens)
        end = len(seq.prompt_logprobs) if seq.num_unscored else seq.num_tokens - 1
        return seq.page_hashes[: self._offered(seq, end) // self._pool.page_size]

    def offered_hashes(self, seq: Sequence) -> list[bytes]:
        """Of the computed pages that others may take over."""
        self._extend_hashes(seq, seq.num_computed)
        return seq.page_hashes[: self._offered(seq, seq.num_computed) // self._pool.page_size]

    def _offered(self, seq: Sequence, num_tokens: int) -> int:
        """With states, the pages of a prompt alone."""
        return num_tokens if self.block is None else min(num_tokens, seq.num_prompt)

    def _with_state(self, seq: Sequence, pages: list[int], block: int) -> CachedPrefix:
        """As many of the pages as end at a saved state."""
        size = self._pool.page_size
        longest = len(pages) * size // block * block
        self._shared_until[seq] = longest
        for end in range(longest, 0, -block):
            if (digest := seq.page_hashes[end // size - 1]) in self.saved:
                return CachedPrefix(pages[: end // size], self.saved.use(digest))
        return NOTHING

    def whole_blocks(self, seq: Sequence, count: int) -> int:
        """`count` tokens from `num_computed` on, or fewer: a run that ends within the prompt ends with a block."""
        end = seq.num_computed + count
        if self.block is None or end >= seq.num_prompt:
            return count
        return max(0, end // self.block * self.block - seq.num_computed)

    def saves(self, seq: Sequence, end: int) -> tuple[SavedAt, ...]:
        """Where a run from `num_computed` to `end` saves states: at its last whole block, and where another prompt
        has left this one. To be called once for a run that will be computed."""
        if not self.is_on or self.block is None:
            return ()
        last = min(end, seq.num_prompt) // self.block * self.block
        wanted = sorted({self._shared_until.get(seq, 0), last})
        found = tuple(
            SavedAt(place, row)
            for place in wanted
            if seq.num_computed < place <= end
            and self._hash_until(seq, place) not in self.saved
            and (row := self.saved.take()) is not None
        )
        if found:
            self._pending[seq] = found
        return found

    def _hash_until(self, seq: Sequence, num_tokens: int) -> bytes:
        return seq.page_hashes[num_tokens // self._pool.page_size - 1]

    def publish(self, item: ScheduledSequence) -> None:
        """Make what this run has filled findable for others: whole pages, and saved states."""
        if not self.is_on:
            return
        seq, size = item.seq, self._pool.page_size
        self._extend_hashes(seq, seq.num_computed)
        for page in range(item.start // size, self._offered(seq, seq.num_computed) // size):
            self._pool.register(seq.page_ids[page], seq.page_hashes[page])
        for place, row in self._pending.pop(seq, ()):
            self.saved.register(row, self._hash_until(seq, place))
            if item.restored is None and 0 < item.start != self._shared_until.get(seq):
                self.saved.demote(self._hash_until(seq, item.start))

    def drop(self, seq: Sequence) -> None:
        """The sequence leaves the batch: what it was about to save is not written."""
        self._shared_until.pop(seq, None)
        for _, row in self._pending.pop(seq, ()):
            self.saved.give_back(row)

    def check_integrity(self, loading: Iterable[int] = ()) -> None:
        """AssertionError if rows of saved states are lost or shared. `loading`: rows that others are writing to."""
        self.saved.check_integrity([*loading, *(row for saves in self._pending.values() for _, row in saves)])

    def _extend_hashes(self, seq: Sequence, num_tokens: int) -> None:
        """Hash the full pages among the first `num_tokens` tokens that have no hash yet."""
        size = self._pool.page_size
        for page in range(len(seq.page_hashes), num_tokens // size):
            parent = seq.page_hashes[-1] if seq.page_hashes else seq.prefix_root
            seq.page_hashes.append(page_hash(parent, seq.token_ids[page * size : (page + 1) * size]))
