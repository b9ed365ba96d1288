"""The process of one grammar: compiles it, then computes masks for all sequences that follow it.

First message: JSON of the grammar. First answer: words [status, memory in KiB] and, where it was refused, why.
From then on a Step each, answered by words [memory in KiB, a length per row], then each row's mask (length 0) or
error text. Ends when the socket closes.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Executor

from llguidance import LLMatcher, LLTokenizer

from moe_serve.grammars import wire
from moe_serve.grammars.compiler import limits
from moe_serve.grammars.compiler.compiling import compile_grammar
from moe_serve.grammars.refusal import RefusedError

COMPILED, REFUSED = 0, 1
FIRST_ANSWER_BYTES = 2 * wire.WORD_BYTES
RECURSION = 20_000
"""Levels that our own readers may nest; the stack is made for more."""
DEFECT = 70
"""Exit status of an error that is ours."""


def run(channel: socket.socket, tokenizer: LLTokenizer, memory_bytes: int, cpu_s: int, is_idle: bool) -> None:
    """Serve one grammar and end the process; never returns. `is_idle`: compile on the time that others leave."""
    status = [DEFECT]

    def serve() -> None:
        sys.setrecursionlimit(RECURSION)
        compiling = limits.low_priority_thread(is_idle)
        limits.limit_memory(memory_bytes)
        limits.limit_cpu(cpu_s)
        status[0] = _serve(channel, tokenizer, compiling)

    try:
        limits.die_with_parent()
        limits.silence()
        limits.with_deep_stack(serve)
    finally:
        os._exit(status[0])


def _serve(channel: socket.socket, tokenizer: LLTokenizer, compiling: Executor) -> int:
    """Exit status."""
    base_kib = limits.peak_kib()
    try:
        matcher = compiling.submit(_compile, channel, wire.receive(channel), tokenizer, base_kib).result()
        if matcher is not None:
            limits.lift_cpu_limit()
            follower = Follower(matcher, base_kib)
            while True:
                channel.sendall(follower.answer(wire.Step.unpack(wire.receive(channel))))
    except (EOFError, OSError):  # the server does not want it any more
        pass
    return 0


def _compile(channel: socket.socket, message: bytes, tokenizer: LLTokenizer, base_kib: int) -> LLMatcher | None:
    wanted = json.loads(message)
    try:
        matcher = compile_grammar(wanted["kind"], wanted["text"], tokenizer)
    except RefusedError as error:
        reason = str(error).encode(errors="replace")
        wire.send(channel, wire.pack_words((REFUSED, 0)) + reason)
        return None
    wire.send(channel, wire.pack_words((COMPILED, limits.peak_kib() - base_kib)))
    return matcher


class Follower:
    """The matchers of one grammar, each as far as its sequence has come."""

    def __init__(self, fresh: LLMatcher, base_kib: int) -> None:
        self._fresh = fresh
        self._base_kib = base_kib
        self._matchers: dict[int, LLMatcher] = {}

    def answer(self, step: wire.Step) -> bytes:
        """Masks, or errors, of a step's rows."""
        for matcher in step.forgotten:
            self._matchers.pop(matcher, None)
        lengths, parts = [], []
        for matcher, tokens in step.rows:
            error, part = self._row(matcher, tokens, step.num_words)
            lengths.append(len(error))
            parts.append(error or part)
        head = wire.pack_words((limits.peak_kib() - self._base_kib, *lengths))
        return b"".join((head, *parts))

    def _row(self, matcher_id: int, tokens: Sequence[int], num_words: int) -> tuple[bytes, bytes | bytearray]:
        """(error, mask) of one row."""
        matcher = self._matchers.get(matcher_id)
        if matcher is None:
            matcher = self._matchers[matcher_id] = self._fresh.deep_copy()
        if tokens:
            matcher.consume_tokens(list(tokens))
        mask = bytearray(num_words * wire.WORD_BYTES)
        view = (ctypes.c_char * len(mask)).from_buffer(mask)
        matcher.unsafe_compute_mask_ptr(ctypes.addressof(view), len(mask))
        return (matcher.get_error().encode() or b"unknown", b"") if matcher.is_error() else (b"", mask)
