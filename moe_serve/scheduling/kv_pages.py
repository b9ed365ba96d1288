"""PagePool: which KV pages are free, which are shared, and which prefix each one holds.

Knows page numbers, reference counts and prefix hashes; knows nothing of tensors, sequences or
scheduling, and imports no torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Identity of a full page: its tokens and everything before them.

    `parent` is the hash of the page before (b"" for the first). 128 bits of BLAKE2b: two prompts a
    client could craft to collide would read each other's keys and values, so Python's hash() will
    not do.
    """
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(array("q", token_ids).tobytes())
    return digest.digest()


class PagePool:
    """`num_pages` pages of `page_size` tokens with reference counts and a prefix index.

    A page is in exactly one of three states:
      in use     ref_count > 0; may also carry a prefix hash, so that others can share it
      cached     ref_count = 0, carries a hash: free, but its contents can still be found
      empty      ref_count = 0, no hash
    `allocate` takes empty pages first and then evicts cached ones, least recently used first.

    Example, page_size 4: sequence A of 10 tokens holds pages [0, 1, 2]; pages 0 and 1 are full and
    get hashes h0 = H(tokens 0-3), h1 = H(h0, tokens 4-7). Sequence B with the same first 8 tokens
    asks match([h0, h1, ...]) -> [0, 1], shares both (ref_count 2) and needs pages for the rest only.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0
        assert page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        self._ref_count = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        # Popped from the end, so the lowest page numbers go first and runs stay consecutive.
        self._empty = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._versions = [0] * num_pages

    def version_of(self, digest: bytes) -> tuple[int, int] | None:
        """(page, version) of a known prefix; any thread may ask. A page whose version is still the same after it was
        read held that prefix all the while."""
        page = self._page_of.get(digest)
        return None if page is None else (page, self._versions[page])

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could hand out now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def usage_frac(self) -> float:
        """Fraction of pages some sequence holds."""
        return 1.0 - self.num_free / self.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with ref_count 1, or None (and nothing changed) if there are too few."""
        if count > self.num_free:
            return None
        pages = [self._take_one() for _ in range(count)]
        for page in pages:
            self._ref_count[page] = 1
        return pages

    def _take_one(self) -> int:
        if self._empty:
            return self._empty.pop()
        page, _ = self._cached.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        digest = self._hash_of[page]
        assert digest is not None
        del self._page_of[digest]
        self._hash_of[page] = None
        self._versions[page] += 1

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of `hashes`; takes no reference."""
        pages = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Take one more reference to each page found by `match`."""
        for page in pages:
            if self._ref_count[page] == 0:
                del self._cached[page]
            self._ref_count[page] += 1

    def num_evictable(self, pages: Iterable[int]) -> int:
        """How many of `pages` are cached but unreferenced, so that sharing them uses up free pages."""
        return sum(self._ref_count[page] == 0 for page in pages)

    def register(self, page: int, digest: bytes) -> None:
        """Publish a full, computed page under its prefix hash. The first page with a hash keeps it."""
        assert self._ref_count[page] > 0
        if self._hash_of[page] is None and digest not in self._page_of:
            self._hash_of[page] = digest
            self._page_of[digest] = page

    def free(self, pages: Sequence[int]) -> None:
        """Give back one reference to each page of a sequence, in sequence order.

        The last pages become evictable first: a prefix is only useful from its beginning.
        """
        for page in reversed(pages):
            assert self._ref_count[page] > 0
            self._ref_count[page] -= 1
            if self._ref_count[page] == 0:
                if self._hash_of[page] is None:
                    self._empty.append(page)
                else:
                    self._cached[page] = None

    def clear_cache(self) -> None:
        """Forget every cached prefix no sequence uses."""
        for page in self._cached:
            self._forget(page)
        self._empty.extend(self._cached)
        self._cached.clear()

    def check_integrity(self, held: Iterable[Sequence[int]] | None = None) -> None:
        """Prove the invariants; AssertionError says which one broke.

        `held`, if given, is the page list of every live sequence: references must add up exactly.
        """
        free = list(self._empty) + list(self._cached)
        assert len(set(free)) == len(free), "a page is free twice"
        assert all(self._ref_count[p] == 0 for p in free), "a free page is referenced"
        in_use = [p for p in range(self.num_pages) if self._ref_count[p] > 0]
        assert len(free) + len(in_use) == self.num_pages, "a page is neither free nor in use"
        assert all(self._hash_of[p] is None for p in self._empty), "an empty page carries a hash"
        assert all(self._hash_of[p] is not None for p in self._cached), "a cached page has no hash"
        assert {d: p for p, d in enumerate(self._hash_of) if d is not None} == self._page_of, "hash index is wrong"
        if held is not None:
            counts = [0] * self.num_pages
            for pages in held:
                assert len(set(pages)) == len(pages), "a sequence holds a page twice"
                for page in pages:
                    counts[page] += 1
            assert counts == self._ref_count, "reference counts do not match the live sequences"
