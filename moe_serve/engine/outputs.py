"""What the engine tells of a sequence: an output per step, and what a client reads of a failure. Knows no steps."""

from __future__ import annotations

import time

from moe_serve.engine.step_stats import finished_stats
from moe_serve.errors import InvalidRequestError, MoEServeError, OverloadedError
from moe_serve.scheduling.batch_plan import Blame, StepError
from moe_serve.scheduling.sequence import SampleOutput, Sequence


def told(seq: Sequence, error: StepError) -> MoEServeError:
    """What the client is told of a failure in a step."""
    if error.blame is Blame.GRAMMAR:
        param = seq.params.grammar.param if seq.params.grammar is not None else "grammar"
        return InvalidRequestError(param, f"{param}: {error.message}")
    if error.blame is Blame.LOAD:
        return OverloadedError(error.message, retry_after_s=10)
    return MoEServeError(error.message)


def output_of(
    seq: Sequence, text: str, error: MoEServeError | None = None, starts: tuple[int, ...] = ()
) -> SampleOutput:
    """`starts`: where the text of each new token begins in the sample's."""
    num_new = len(starts)
    wants_logprobs = seq.params.logprobs is not None and num_new > 0
    return SampleOutput(
        request_id=seq.request.request_id,
        index=seq.index,
        text=text,
        token_ids=tuple(seq.token_ids[len(seq.token_ids) - num_new :]),
        logprobs=tuple(seq.logprobs[-num_new:]) if wants_logprobs else (),
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
        num_prompt_tokens=seq.num_prompt,
        num_cached_tokens=seq.num_cached,
        num_disk_tokens=min(seq.num_loaded, seq.num_cached),
        num_output_tokens=seq.num_generated,
        error=error,
        prompt_logprobs=tuple(seq.prompt_logprobs) if seq.num_generated <= 1 else (),
        text_starts=starts if wants_logprobs else (),
        stats=finished_stats(seq, time.monotonic()) if seq.is_finished else None,
    )
