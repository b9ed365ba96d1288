"""HostExperts: computes missing experts from their host copies, beside a device or instead of reading them.

Tokens go to the host, results come back (Fiddler: activations are smaller than weights). On a CPU the same kernel runs
as for experts in slots, so not a bit differs; beside a GPU it runs on a thread of its own while the GPU works, and its
float32 sums differ from the GPU's in the last bits.

Shape alphabet: T tokens, H hidden, P (token, choice) pairs sorted by expert.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from expert_cache.host_compute.host_copies import HostCopies
from expert_cache.running import ExpertCompute, Regrouped, Segment
from expert_cache.storage import ExpertReadError
from predictors.shape import MoELayer

Failures = dict[int, ExpertReadError]


@dataclass(frozen=True, slots=True)
class HostRun:
    """Some experts of one layer and step on the host."""

    experts: tuple[int, ...]
    segments: tuple[Segment, ...]
    result: Callable[[], tuple[torch.Tensor, Failures]]

    def finish(self, out: torch.Tensor) -> Failures:
        """Put their rows into `out` [P, H]; returns the experts that could not be read, whose rows are not filled."""
        rows, failed = self.result()
        start = 0
        for expert, (first, last) in zip(self.experts, self.segments, strict=True):
            if expert not in failed:
                out[first:last] = rows[start : start + last - first].to(out.device, non_blocking=True)
            start += last - first
        return failed


class HostExperts:
    """One model's experts on the host's CPU."""

    def __init__(self, copies: HostCopies, compute: ExpertCompute, beside_device: bool) -> None:
        """`compute`: of the CPU. `beside_device`: on a thread of its own; otherwise at once, on the caller's."""
        self._copies, self._compute = copies, compute
        self._thread = ThreadPoolExecutor(1, "moe-serve-host-lane") if beside_device else None
        self._close = weakref.finalize(self, _close, self._thread, copies)

    def start(self, layer: MoELayer, hidden: torch.Tensor, groups: Regrouped, experts: Sequence[int]) -> HostRun:
        """Begin with these experts; hidden [T, H] on any device."""
        segments = tuple(groups.segments[e] for e in experts)
        tokens = torch.cat([groups.tokens[first:last] for first, last in segments])
        x = hidden.index_select(0, tokens).cpu()
        work = partial(self.run, layer, x, tuple(experts), [last - first for first, last in segments])
        result = self._thread.submit(work).result if self._thread else partial(_identity, work())
        return HostRun(tuple(experts), segments, result)

    def run(
        self, layer: MoELayer, x: torch.Tensor, experts: Sequence[int], counts: Sequence[int]
    ) -> tuple[torch.Tensor, Failures]:
        """x [P, H], `counts` rows of each expert in turn -> [P, H], float32 at least.

        One expert after the other. Without a device each is let go of at once, so that one at most adds to the memory
        of the process; below a device, host memory is the tier in which they stay.
        """
        out, failed, start = self._compute.result_like(x, len(x)), {}, 0
        tokens = torch.arange(len(x))
        for expert, count in zip(experts, counts, strict=True):
            try:
                weights = self._copies.weights(layer, expert)
                self._compute.run(x, tokens, [(start, start + count)], [weights], out)
            except ExpertReadError as error:
                failed[expert] = error
            if self._thread is None:
                self._copies.let_go(layer, expert)
            start += count
        return out, failed

    def close(self) -> None:
        """End the thread; more than once does no harm."""
        self._close()


def _close(thread: ThreadPoolExecutor | None, copies: HostCopies) -> None:
    if thread:
        thread.shutdown(cancel_futures=True)
    copies.close()


def _identity(value: tuple[torch.Tensor, Failures]) -> tuple[torch.Tensor, Failures]:
    return value
