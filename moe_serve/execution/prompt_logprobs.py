"""Log-probabilities of a prompt's own tokens, from the logits of the positions before them.

Which positions a step scores is in the plan (ScheduledSequence.scored); here logits become numbers. Knows nothing of
models or scheduling.

Shape alphabet: R scored positions of a step, V vocabulary.
"""

from __future__ import annotations

import torch

from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve.scheduling.sequence import Sequence, TokenLogprob

ROWS_AT_ONCE = 64
"""Log-probabilities are float32 and a copy: a few rows at a time keep them small beside the logits."""


def score(logits: torch.Tensor, plan: BatchPlan) -> dict[Sequence, tuple[TokenLogprob, ...]]:
    """What a step tells of its prompts. `logits` [R, V]: of the scored positions, in plan order."""
    found = {}
    first = 0
    for item in plan.scheduled:
        if item.scored:
            rows = logits[first : first + len(item.scored)]
            targets = [item.seq.token_ids[position + 1] for position in item.scored]
            found[item.seq] = tuple(_score(rows, targets, item.seq.params.prompt_logprobs or 0))
            first += len(item.scored)
    assert first == len(logits), f"{len(logits)} rows of logits for {first} scored positions"
    return found


def _score(logits: torch.Tensor, targets: list[int], num_top: int) -> list[TokenLogprob]:
    """One entry for each row of `logits` [n, V] and the token that really follows it."""
    found = []
    for first in range(0, len(targets), ROWS_AT_ONCE):
        logprobs = logits[first : first + ROWS_AT_ONCE].float().log_softmax(dim=-1)
        tokens = targets[first : first + ROWS_AT_ONCE]
        own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
        ranks = (logprobs > own).sum(dim=-1) + 1
        values, ids = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
        rows = zip(tokens, own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
        found += [TokenLogprob(t, p, tuple(zip(i, v, strict=True)), r) for t, p, r, i, v in rows]
    return found
