"""Rows of a step whose batch every rank has whole: where each begins, and sampling of those that end here.

Knows plans and logits; knows no communication.

Shape alphabet: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import torch

from moe_serve import forward_batch, sampler
from moe_serve.forward_batch import ForwardBatch
from moe_serve.model_runner import ModelRunner
from moe_serve.parallel.messages import RankStep, Sampled
from moe_serve.parallel.sharing import LossNotes


def start_ranks(step: RankStep, device: torch.device) -> torch.Tensor:
    """[T] int64: the rank where each row of the batch begins."""
    starts = {id(item): start for item, start in zip(step.plan.scheduled, step.starts, strict=True)}
    rows = [starts[id(item)] for item in forward_batch.order_for_batch(step.plan) for _ in range(item.count)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def sample_rows(
    runner: ModelRunner, step: RankStep, batch: ForwardBatch, rows: torch.Tensor, logits: torch.Tensor
) -> dict[int, Sampled]:
    """Tokens by index of the step's items; logits [n, V] are those of `rows` [n], which the batch wants sampled."""
    if not len(logits):
        return {}
    wanted = [i for i, item in enumerate(step.plan.scheduled) if item.needs_sample]
    of_row = dict(zip(batch.sample_rows.tolist(), batch.sample_order, strict=True))
    items = [wanted[of_row[row]] for row in rows.tolist()]
    seqs = [step.plan.scheduled[i].seq for i in items]
    tokens, logprobs = sampler.sample(logits, seqs, runner.config.seed, runner.eos_token_ids)
    return dict(zip(items, zip(tokens, logprobs, strict=True), strict=True))


def errors_of(step: RankStep, losses: LossNotes) -> dict[int, str]:
    """What went wrong with the step's items, by index."""
    failed = forward_batch.by_sequence(step.plan, losses.take())
    return {i: failed[item.seq].message for i, item in enumerate(step.plan.scheduled) if item.seq in failed}
