"""Weights or activations that are not finite: their requests end with an error that says so, the others go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve import LLM, SamplingParams
from moe_serve.execution import broken_logits
from moe_serve.scheduling.sequence import Request

from .serving import load, runner_of

Checkpoint = Callable[[str], Path]
SICK = 77
"""A token whose embedding is broken."""


def embeddings_of(llm: LLM) -> torch.Tensor:
    """[V, H]."""
    model: Any = runner_of(llm).model
    table: torch.Tensor = model.get_input_embeddings().weight
    return table


def finish(llm: LLM, prompts: list[list[int]], **params: Any) -> list[tuple[list[int], str | None]]:
    """Tokens and error of each prompt, all in one batch."""
    settings = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, **params)
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(Request(str(i), tuple(prompt), settings))
    tokens: list[list[int]] = [[] for _ in prompts]
    errors: list[str | None] = [None] * len(prompts)
    while llm.engine.has_work():
        for output in llm.engine.step():
            tokens[int(output.request_id)] += output.token_ids
            if output.error is not None:
                errors[int(output.request_id)] = output.error.message
    llm.engine.check_integrity()
    return list(zip(tokens, errors, strict=True))


@pytest.mark.parametrize("eager", [False, True], ids=["kernels", "modules"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_sick_request_among_others(
    value: float, eager: bool, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    llm = load(checkpoint("mixtral"), enforce_eager=eager)
    healthy = [[5, 6, 7], [9, 10, 11, 12]]
    expected = finish(llm, healthy)
    table = embeddings_of(llm)
    kept = table[SICK].clone()
    with torch.no_grad():
        table[SICK] = value
    try:
        got = finish(llm, [healthy[0], [3, SICK, 4], healthy[1]])
    finally:
        with torch.no_grad():
            table[SICK] = kept
    assert [got[0], got[2]] == expected
    assert got[1] == ([], broken_logits.MESSAGE)
    assert "request 1 ends with an error" in caplog.text


def test_a_scored_prompt(checkpoint: Checkpoint) -> None:
    llm = load(checkpoint("mixtral"))
    table = embeddings_of(llm)
    kept = table[SICK].clone()
    with torch.no_grad():
        table[SICK] = math.nan
    try:
        got = finish(llm, [[3, SICK, 4, 5]], prompt_logprobs=1)
    finally:
        with torch.no_grad():
            table[SICK] = kept
    assert got == [([], broken_logits.MESSAGE)]
