"""Rows of a step whose batch every rank has whole: where each is at home, and sampling of those at home here.

Knows plans and logits; knows no communication.

Shape alphabet: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import torch

from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution import forward_batch, sampler
from moe_serve.execution.forward_batch import ForwardBatch
from moe_serve.parallel.modes.expert_share import LossNotes
from moe_serve.parallel.modes.runner import RankStep
from moe_serve.parallel.wire.messages import Sampled
from moe_serve.scheduling.batch_plan import StepError


def home_ranks(step: RankStep, device: torch.device) -> torch.Tensor:
    """[T] int64: the home of each row of the batch."""
    homes = {id(item): home for item, home in zip(step.plan.scheduled, step.homes, strict=True)}
    rows = [homes[id(item)] for item in forward_batch.order_for_batch(step.plan) for _ in range(item.count)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def sample_rows(
    runner: ModelRunner, step: RankStep, batch: ForwardBatch, rows: torch.Tensor, logits: torch.Tensor
) -> tuple[dict[int, Sampled], dict[int, StepError], tuple[int, ...]]:
    """Tokens, errors of those whose grammar gave up, and those whose mask is late, by index of the step's items.

    Logits [n, V] are those of `rows` [n], which the batch wants sampled. Which rank samples what is known only after
    the forward pass, so masks are not computed beside it.
    """
    if not len(logits):
        return {}, {}, ()
    wanted = [i for i, item in enumerate(step.plan.scheduled) if item.needs_sample]
    of_row = dict(zip(batch.sample_rows.tolist(), batch.sample_order, strict=True))
    items = [wanted[of_row[row]] for row in rows.tolist()]
    seqs = [step.plan.scheduled[i].seq for i in items]
    pending = runner.masks.start(seqs)
    masks = pending.result() if pending is not None else None
    tokens, logprobs = sampler.sample(logits, seqs, runner.config.seed, runner.eos_token_ids, masks)
    of_item = dict(zip(items, zip(tokens, logprobs, strict=True), strict=True))
    if masks is None:
        return of_item, {}, ()
    stuck = {i: masks.errors[seq] for i, seq in zip(items, seqs, strict=True) if seq in masks.errors}
    return of_item, stuck, tuple(i for i, seq in zip(items, seqs, strict=True) if seq in masks.late)


def errors_of(step: RankStep, losses: LossNotes) -> dict[int, StepError]:
    """What went wrong with the step's items, by index."""
    failed = forward_batch.by_sequence(step.plan, losses.take())
    return {i: StepError(failed[item.seq].message) for i, item in enumerate(step.plan.scheduled) if item.seq in failed}
