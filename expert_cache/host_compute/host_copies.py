"""HostCopies: experts where the checkpoint is mapped, as the CPU's kernel takes them.

What the mapped file holds costs no memory of its own. It is used only if the file is still the one that was opened: a
page of a truncated file would end the process, and bytes of a changed one are not the model's.
Knows no slots and no policy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import xxhash

from expert_cache.running import PreparedWeights
from expert_cache.storage import DirectFile, ExpertReadError, ExpertStore, ExpertWeights, Read, page_cache
from predictors.shape import Key, MoELayer


class HostCopies:
    """A store's experts in place."""

    def __init__(self, store: ExpertStore, prepare: Callable[[ExpertWeights], PreparedWeights]) -> None:
        """`prepare`: into the form of the CPU's kernel."""
        self._store, self._prepare = store, prepare
        self._weights: dict[Key, PreparedWeights] = {}
        self._files: dict[Path, DirectFile] = {}
        self._told: dict[Path, bool] = {}
        for layer in store.layers:
            for expert in range(store.num_experts):
                for read in store.reads(layer, expert):
                    self._told.setdefault(read.file, page_cache.tells_about(read.file))
        for file in self._told:
            self._files[file] = DirectFile(file, direct=False)

    def is_in_memory(self, layer: MoELayer, expert: int) -> bool:
        """The page cache holds all of it, and the system says so reliably."""
        reads = self._store.reads(layer, expert)
        return all(self._told[read.file] for read in reads) and page_cache.is_cached(_span(r) for r in reads)

    def weights(self, layer: MoELayer, expert: int) -> PreparedWeights:
        """Views of the mapped file. ExpertReadError: it has changed, or does not match its checksum."""
        for read in self._store.reads(layer, expert):
            try:
                self._files[read.file].check_unchanged()
            except ExpertReadError as error:
                name = self._store.name(layer, expert)
                raise ExpertReadError(f"{name}: {error.message} (tensors {read.names})") from None
        if not page_cache.map_in(_span(read) for read in self._store.reads(layer, expert)):
            raise ExpertReadError(self._describe(layer, expert, "cannot be read where it is mapped"))
        self._verify(layer, expert)
        if (layer, expert) not in self._weights:
            self._weights[layer, expert] = self._prepare(self._store.weights(layer, expert))
        return self._weights[layer, expert]

    def let_go(self, layer: MoELayer, expert: int) -> None:
        """It has been used; it counts no longer as this process's memory."""
        page_cache.let_go(_span(read) for read in self._store.reads(layer, expert))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _verify(self, layer: MoELayer, expert: int) -> None:
        """Every time: the page may have come from the disk again since the last one."""
        checksum = self._store.checksum(layer, expert)
        if checksum is None or checksum == _checksum(self._store.reads(layer, expert)):
            return
        what = "the checksum does not match, the data on disk is damaged; make the expert file again with"
        raise ExpertReadError(self._describe(layer, expert, f"{what} `moe-serve pack`"))

    def _describe(self, layer: MoELayer, expert: int, what: str) -> str:
        reads = self._store.reads(layer, expert)
        where = "; ".join(f"{r.file} at byte {r.offset}, tensors {r.names}" for r in reads)
        return f"{self._store.name(layer, expert)}: {what} ({where})"


def _span(read: Read) -> page_cache.Span:
    """Consecutive bytes of a file are consecutive in its mapping."""
    return page_cache.pages_of(read.tensors[0][1].tensor.data_ptr(), read.num_bytes)


def _checksum(reads: tuple[Read, ...]) -> str:
    digest = xxhash.xxh3_64()
    for read in reads:
        for _, stored in read.tensors:
            digest.update(stored.tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
