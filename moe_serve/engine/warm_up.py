"""Steps that run on a GPU before the first request: kernels are compiled here, and not while a client waits.

Triton compiles a kernel when it is first launched with a tile, in 1 to 3 s each, and which tile that is follows from a
step's tokens. The largest step also shows whether what a step needs fits beside experts and pages: if it does not, the
server ends with an error that names the flags, and not in the middle of an answer. Knows plans; nothing of kernels.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable

import torch

from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence

log = logging.getLogger(__name__)


def sizes_up_to(limit: int) -> list[int]:
    """Tokens of the steps: powers of two, and `limit` itself. Tiles change where tokens per expert double."""
    return [*(1 << i for i in range(limit.bit_length()) if 1 << i < limit), limit]


def plan_of(num_tokens: int, page_size: int) -> BatchPlan:
    """One prompt of that many tokens, in the first pages."""
    tokens = [0] * num_tokens
    request = Request("warm-up", tuple(tokens), SamplingParams(max_tokens=1))
    pages = array("q", range(-(-num_tokens // page_size)))
    sequence = Sequence(request, 0, tokens, num_tokens + 1, page_ids=pages)
    return BatchPlan((ScheduledSequence(sequence, 0, num_tokens),))


def warm_up(run: Callable[[BatchPlan], object], largest: int, page_size: int) -> None:
    """Run one prompt of each size up to `largest` tokens. ConfigError: the GPU's memory does not hold such a step."""
    for num_tokens in sizes_up_to(largest):
        try:
            run(plan_of(num_tokens, page_size))
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a step of {num_tokens} tokens does not fit into the GPU's memory beside experts and KV pages; lower"
                " --max-num-batched-tokens, --moe-cache-mib or --kv-cache-mib"
            ) from error


def log_peak(device: torch.device, before: int, reserved: int) -> None:
    """What the largest step took beside the `before` bytes of weights and pages, and what sizing had reserved."""
    took = torch.cuda.max_memory_allocated(device) - before
    level = logging.WARNING if took > reserved else logging.INFO
    log.log(level, "the largest step took %d MiB of the GPU; %d MiB were reserved", took // MIB, reserved // MIB)
