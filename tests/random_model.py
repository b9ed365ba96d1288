"""The real engine, scheduler, sampler and grammars over a model that says random things.

For tests of what is decided after the forward pass, without one.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from expert_cache.report import ExpertTotals
from expert_cache.running.experts import ResizeError
from moe_serve.config import EngineConfig
from moe_serve.engine.engine import Engine
from moe_serve.execution import sampler
from moe_serve.execution.prompt_logprobs import score
from moe_serve.grammars.masks import MaskThread
from moe_serve.scheduling.batch_plan import BatchPlan, StepResult
from moe_serve.scheduling.sequence import Request, SampleOutput, SamplingParams, Sequence, TokenLogprob
from moe_serve.spec import ModelSpec
from moe_serve.text.tokenizer import Tokenizer

Outputs = dict[tuple[str, int], list[SampleOutput]]
"""By (request id, sample), in order."""


class NoExperts:
    """The experts of a model that has none."""

    def resize(self, mib: int) -> None:
        raise ResizeError("there is no cache")

    def resident(self) -> None:
        """No expert is anywhere."""

    def report(self) -> None:
        """Nothing is known."""

    def totals(self) -> ExpertTotals:
        return ExpertTotals()

    def close(self) -> None:
        """Nothing to stop."""


class DenseRunner:
    """The part of a Runner that is about experts, for models that have none."""

    def __init__(self) -> None:
        self.experts = NoExperts()

    def observe_routes(self, wanted: bool, weights: bool = False) -> None:
        """There are none."""

    def moe_layer_ids(self) -> tuple[int, ...]:
        return ()


class RandomRunner(DenseRunner):
    """Logits are noise, a function of the tokens so far; `script` (ids) is what it says instead, if it may."""

    def __init__(self, vocab_size: int, eos: frozenset[int], config: EngineConfig) -> None:
        self.config = config
        self.script: list[int] = []
        self._vocab_size = vocab_size
        super().__init__()
        self._eos = eos
        self._masks = MaskThread(vocab_size)

    def run(self, plan: BatchPlan) -> StepResult:
        seqs = [s.seq for s in plan.scheduled if s.needs_sample]
        pending = self._masks.start(seqs)
        logits = torch.stack([self._logits(s) for s in seqs]) if seqs else torch.zeros(0, self._vocab_size)
        masks = pending.result() if pending is not None else None
        tokens, logprobs = sampler.sample(logits, seqs, self.config.seed, self._eos, masks)
        errors = masks.errors if masks is not None else {}
        late = masks.late if masks is not None else frozenset()
        return StepResult(tuple(tokens), tuple(logprobs), errors, prompt_logprobs=self._scores(plan), late=late)

    def _scores(self, plan: BatchPlan) -> dict[Sequence, tuple[TokenLogprob, ...]]:
        rows = [self.noise(i.seq.token_ids[: p + 1]) for i in plan.scheduled for p in i.scored]
        return score(torch.stack(rows), plan) if rows else {}

    def noise(self, token_ids: list[int]) -> torch.Tensor:
        """Logits [V] after these tokens."""
        seed = zlib.crc32(repr(token_ids).encode())
        return torch.randn(self._vocab_size, generator=torch.Generator().manual_seed(seed))

    def _logits(self, seq: Sequence) -> torch.Tensor:
        logits = self.noise(seq.token_ids)
        if seq.num_generated < len(self.script):
            logits[self.script[seq.num_generated]] += 50.0
        return logits

    def close(self) -> None:
        self._masks.close()


def random_engine(tokenizer: Tokenizer, **settings: Any) -> Engine:
    """An Engine over a RandomRunner; keyword arguments are EngineConfig's fields."""
    values = {"num_kv_pages": 256, "max_model_len": 512, "page_size": 8, "max_num_seqs": 8} | settings
    eos = frozenset(tokenizer.eos_token_ids)
    size = tokenizer.vocab_size
    runner = RandomRunner(size, eos, EngineConfig.of(**values))
    return Engine(runner, tokenizer, ModelSpec("random", torch.float32, size, 512, 1, 8, 2, 1, 8, 8), eos)


def run_all(engine: Engine, requests: dict[str, SamplingParams], prompt: tuple[int, ...] = (5, 6, 7)) -> Outputs:
    """Outputs of all requests, by (request id, sample)."""
    for request_id, params in requests.items():
        engine.add_request(Request(request_id, prompt, params))
    outputs: Outputs = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check_integrity()
    return outputs
