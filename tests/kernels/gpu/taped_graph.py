"""TapedCapture: stands in for CUDA's graphs where there is no GPU. Not CUDA: a tape of operations on CPU tensors.

It keeps what makes graphs dangerous. Recorded are torch's operations and Triton's launches with the very tensors they
had; a replay repeats them into the same memory, without any of the Python in between. So whatever depends on a Python
value of the moment of capture, or on memory that was only allocated and never written, comes out wrong here as it
would there; and whatever asks the device for a value ends the capture with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

aten = torch.ops.aten
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
"""Operations whose result, or its shape, the host has to wait for."""


class Tape(TorchDispatchMode):
    """What happened, in order, as functions that do it again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Callable[[], None]] = []
        self._is_launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_launching:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        has_mask = any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2]))
        if name in WAITING or (name == "index" and has_mask):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **kwargs)
        inputs = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and _memory(t) not in inputs]
        self.steps.append(lambda: _again(func, args, kwargs, out, fresh))
        return out

    def launch(self, executor: GridExecutor, args: Any, kwargs: Any) -> None:
        """A Triton kernel, now and in every replay."""

        def run() -> None:
            self._is_launching = True
            try:
                LAUNCH(executor, *args, **kwargs)
            finally:
                self._is_launching = False

        run()
        self.steps.append(run)


LAUNCH = GridExecutor.__call__


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _again(func: Any, args: Any, kwargs: Any, out: Any, fresh: list[torch.Tensor]) -> None:
    if func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"):
        for tensor in fresh:
            tensor.fill_(torch.nan if tensor.dtype.is_floating_point else 1 << 6)
        return
    new = func(*args, **kwargs)
    for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
        if any(old is tensor for tensor in fresh):
            old.copy_(value)


@contextmanager
def capturing(tape: Tape) -> Iterator[None]:
    """Everything that asks is told that a capture is under way."""
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        mock.patch.object(GridExecutor, "__call__", lambda self, *args, **kwargs: tape.launch(self, args, kwargs)),
        tape,
    ):
        yield


class TapedCapture:
    """A Capture (moe_serve.execution.cuda_graph)."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        work()  # as before a real capture
        tape = Tape()
        with capturing(tape):
            out = work()
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            for step in tape.steps:
                step()

        return out, replay
