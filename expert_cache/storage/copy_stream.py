"""CopyStream: work that fills slots runs beside the kernels that read others, in an order that only slots decide.

An expert's bytes are copied, and its layout converted, on a stream of their own. That stream waits for the last kernel
that read the slot to be filled, and for no other. A kernel waits for the experts that it reads, and for no other. So an
expert that nothing asks for yet stalls nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Mark(Protocol):
    """A place in the work of a stream."""

    def query(self) -> bool:
        """Whether the work before it is done."""
        ...

    def synchronize(self) -> None:
        """Block until it is."""
        ...


class CopyStream(Protocol):
    """Two streams of one device: the current one, and one for copies."""

    def copying(self) -> AbstractContextManager[object]:
        """What is issued inside goes to the copies' stream."""
        ...

    def copies_so_far(self) -> Mark:
        """The end of the copies' stream."""
        ...

    def kernels_so_far(self) -> Mark:
        """The end of the current stream."""
        ...

    def copies_wait(self, mark: Mark) -> None:
        """Later copies come after what is before the mark."""
        ...

    def kernels_wait(self, mark: Mark) -> None:
        """Later kernels come after what is before the mark."""
        ...


class CudaCopyStream:
    """On a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def copying(self) -> AbstractContextManager[object]:
        """See CopyStream; memory that is allocated inside belongs to the copies' stream."""
        return torch.cuda.stream(self._copies)

    def copies_so_far(self) -> Mark:
        """See CopyStream."""
        return _event(self._copies)

    def kernels_so_far(self) -> Mark:
        """See CopyStream."""
        return _event(torch.cuda.current_stream(self._device))

    def copies_wait(self, mark: Mark) -> None:
        """See CopyStream."""
        assert isinstance(mark, torch.cuda.Event)
        self._copies.wait_event(mark)

    def kernels_wait(self, mark: Mark) -> None:
        """See CopyStream."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event: torch.cuda.Event = stream.record_event()
    return event


class SlotOrder:
    """The order of writes to slots and of kernels that read them. Without a stream for copies, all is in one order."""

    def __init__(self, stream: CopyStream | None = None) -> None:
        self._stream = stream
        self._arrivals: dict[int, Mark] = {}
        """Of slots that no kernel has waited for."""
        self._last_read: dict[int, Mark] = {}

    @contextlib.contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        """What fills the slot is issued inside."""
        if self._stream is None:
            yield
            return
        last_read = self._last_read.pop(slot, None)
        if last_read is not None:
            self._stream.copies_wait(last_read)
        with self._stream.copying():
            yield
        self._arrivals[slot] = self._stream.copies_so_far()

    @contextlib.contextmanager
    def reading(self, slots: Sequence[int]) -> Iterator[None]:
        """Kernels that read these slots are issued inside."""
        if self._stream is None:
            yield
            return
        arrivals = [self._arrivals.pop(slot) for slot in slots if slot in self._arrivals]
        for arrival in arrivals:
            self._stream.kernels_wait(arrival)
        yield
        done = self._stream.kernels_so_far()
        self._last_read.update(dict.fromkeys(slots, done))
