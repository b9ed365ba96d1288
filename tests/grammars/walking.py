"""Random texts that follow a grammar, without a model: any token that the mask allows."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import psutil

from moe_serve.grammars.grammars import Grammars
from moe_serve.grammars.masks import Masks, compute_masks
from moe_serve.scheduling.sequence import GrammarSpec, Request, SamplingParams, Sequence
from moe_serve.text.tokenizer import Tokenizer
from tests.patience import PATIENCE_S


def sequence(grammars: Grammars, spec: GrammarSpec) -> Sequence:
    """One that has sampled nothing yet."""
    seq = Sequence(Request("r", (5,), SamplingParams(grammar=spec)), 0, [5], 10_000)
    seq.matcher = grammars.start(spec)
    return seq


def masks_of(tokenizer: Tokenizer, *seqs: Sequence) -> Masks:
    """Of all of them, however long the machine takes."""
    deadline_s = time.monotonic() + PATIENCE_S
    while (masks := masks_now(tokenizer, *seqs)).late:
        assert time.monotonic() < deadline_s
    return masks


def masks_now(tokenizer: Tokenizer, *seqs: Sequence) -> Masks:
    """As a step gets them."""
    return compute_masks(seqs, list(range(len(seqs))), -(-tokenizer.vocab_size // 32))


def allowed(masks: Masks, seq_row: int, vocab_size: int) -> list[int]:
    """Token ids that one row's mask allows."""
    bits = np.unpackbits(masks.bits[masks.rows.index(seq_row)].view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:vocab_size]).tolist()


def walk(grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, seed: int, most: int = 400) -> tuple[str, bool]:
    """(text, whether it is complete) of a walk that ends as soon as it may, or after `most` tokens."""
    seq, rng = sequence(grammars, spec), random.Random(seed)
    try:
        for _ in range(most):
            masks = masks_of(tokenizer, seq)
            assert not masks.errors, list(masks.errors.values())
            choices = allowed(masks, 0, tokenizer.vocab_size)
            if tokenizer.eos_token_ids & set(choices):
                return tokenizer.decode(seq.token_ids[1:]), True
            seq.token_ids.append(rng.choice(choices))
        return tokenizer.decode(seq.token_ids[1:]), False
    finally:
        assert seq.matcher is not None
        seq.matcher.close()


def hold_up(pid: int) -> None:
    """Stop a process; it goes on with SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    deadline_s = time.monotonic() + PATIENCE_S
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # the signal comes some time after the call
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
