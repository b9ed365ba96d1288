"""Engine: plan, run, apply. One call of `step` is one forward pass over whatever is due.

Owns the scheduler, the page pool and the runner, and turns their integers into SampleOutputs with
text. Single-threaded: moe_serve/engine/async_engine.py runs it on a worker thread. Knows no HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from expert_cache.report import ExpertReport
from expert_cache.running.experts import ExpertsControl, ResizeError
from moe_serve.config import EngineConfig
from moe_serve.engine import expert_aware
from moe_serve.engine.arrivals import Arrivals
from moe_serve.engine.outputs import output_of, told
from moe_serve.engine.runner_loading import load_runner
from moe_serve.engine.step_stats import StepRecorder
from moe_serve.engine.trouble import Trouble
from moe_serve.errors import ContextTooLongError, InvalidRequestError, MoEServeError
from moe_serve.expert_routes.route_recorder import RouteObserver
from moe_serve.expert_routes.usage_forecast import UsageForecast
from moe_serve.grammars.grammars import GrammarLimits, Grammars
from moe_serve.grammars.matcher import Place
from moe_serve.prefix_disk.open import open_tier
from moe_serve.prefix_disk.tier import DiskTier
from moe_serve.scheduling.batch_plan import BatchPlan, StepResult
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.kv_pages import PagePool, page_hash
from moe_serve.scheduling.scheduler import Scheduler
from moe_serve.scheduling.sequence import Request, SampleOutput, Sequence
from moe_serve.scheduling.stats import EngineLoad, StatsObserver
from moe_serve.scheduling.step_draft import SchedulerLimits
from moe_serve.spec import ModelSpec
from moe_serve.speculation.speculator import Speculator
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.generation_defaults import eos_token_ids as read_eos_token_ids
from moe_serve.text.tokenizer import Tokenizer
from predictors.predictor import RouterShape

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a model: tests put a 20-line fake here."""

    config: EngineConfig

    @property
    def experts(self) -> ExpertsControl: ...
    def run(self, plan: BatchPlan) -> StepResult: ...
    def observe_routes(self, wanted: bool, weights: bool = False) -> None: ...
    def moe_layer_ids(self) -> tuple[int, ...]: ...
    def close(self) -> None: ...


class Engine:
    """Serves requests, a step at a time."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, spec: ModelSpec, eos_token_ids: frozenset[int]) -> None:
        config = runner.config
        assert config.kv.num_pages is not None
        assert config.max_model_len is not None
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self.spec = spec
        self.pool = PagePool(config.kv.num_pages, config.kv.page_size)
        self.scheduler = Scheduler(_limits(config), self.pool, eos_token_ids)
        limits = GrammarLimits(config.queue.grammar_timeout_s, config.queue.grammar_memory_mib)
        self._grammars = Grammars.of(tokenizer, spec.vocab_size, eos_token_ids, limits)
        self.observer: StatsObserver | None = None
        self._route_observers: list[RouteObserver] = []
        self.max_model_len = config.max_model_len
        self.num_pages = config.kv.num_pages
        self.page_size = config.kv.page_size
        self._sequences: dict[str, list[Sequence]] = {}
        self._detokenizers: dict[Sequence, IncrementalDetokenizer] = {}
        self._arrivals: Arrivals | None = None
        self._choose_batches_by_experts()
        self._speculator = self._new_speculator()

    def _new_speculator(self) -> Speculator | None:
        """Have next tokens guessed where settings ask for it and states need not be rolled back."""
        if not self.config.speculation.is_on:
            return None
        if self.scheduler.limits.state_block is not None:
            log.warning("--speculative-method is off: states of recurrent layers cannot be rolled back")
            return None
        speculator = self.scheduler.drafter = Speculator(self.config.speculation)
        return speculator

    @staticmethod
    def from_config(config: EngineConfig) -> Engine:
        """Load the model folder `config` names. ConfigError and its subclasses say what is wrong."""
        eos = frozenset(read_eos_token_ids(config.model))
        runner = load_runner(config, eos)
        tokenizer = Tokenizer.from_config(config)
        engine = Engine(runner, tokenizer, runner.spec, eos | frozenset(tokenizer.eos_token_ids))
        engine.cache_on_disk(open_tier(runner.prefix_facts(), engine.pool, engine.scheduler.prefixes))
        return engine

    def cache_on_disk(self, tier: DiskTier | None) -> None:
        """From now on, prefixes of ended requests are written to disk and loaded from there."""
        self._arrivals = None if tier is None else Arrivals(tier)

    def _choose_batches_by_experts(self) -> None:
        """Install expert-aware batching where settings and model ask for it."""
        forecast = UsageForecast(self.routing_shape())
        choice = expert_aware.choice_for(self.config, self.spec, self.runner.experts.resident, forecast)
        if choice is not None:
            self.observe_routes(forecast)
            self.scheduler.choice = choice

    # ---- requests ---------------------------------------------------------------------------------

    def check_request(self, request: Request) -> None:
        """Raise what would make this request impossible. Any thread may call; compiling a grammar takes time."""
        if (compiling := self.begin_check(request)) is not None:
            compiling.result()

    def begin_check(self, request: Request) -> Future[Place] | None:
        """As check_request, but a grammar is compiled meanwhile: the future ends with what is wrong with it. None if
        there is nothing to wait for. Cancelling the future ends the compilation, unless others want it too."""
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequestError("prompt", "the prompt is empty; send at least one token")
        bad = next((t for t in prompt if not 0 <= t < self.spec.vocab_size), None)
        if bad is not None:
            raise InvalidRequestError("prompt", f"token id {bad} is outside the vocabulary of {self.spec.vocab_size}")
        params = request.params
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            ids: Iterable[int] = getattr(params, name)
            bad = next((t for t in ids if t >= self.spec.vocab_size), None)
            if bad is not None:
                raise InvalidRequestError(name, f"token id {bad} is outside the vocabulary of {self.spec.vocab_size}")
        most = self.config.queue.max_prompt_tokens
        if most is not None and len(prompt) > most:
            raise InvalidRequestError(
                "prompt", f"the prompt has {len(prompt)} tokens; this server takes at most {most}"
            )
        wanted = len(prompt) + (1 if params.max_tokens is None else params.max_tokens)
        if wanted > self.max_model_len:
            raise ContextTooLongError(
                "prompt" if len(prompt) >= self.max_model_len else "max_tokens",
                f"the prompt has {len(prompt)} tokens and max_tokens is"
                f" {'not set' if params.max_tokens is None else params.max_tokens};"
                f" together they must not exceed the context of {self.max_model_len} tokens",
            )
        return None if params.grammar is None else self._grammars.begin_check(params.grammar)

    def add_request(self, request: Request) -> None:
        """Queue a checked request. Errors of `check_request` apply."""
        self.check_request(request)
        params = request.params
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(request.prompt_token_ids) + params.max_tokens)
        root = page_hash(b"", list(request.cache_salt.encode())) if request.cache_salt else b""
        sequences = [
            Sequence(request, i, list(request.prompt_token_ids), limit, prefix_root=root) for i in range(params.n)
        ]
        self._sequences[request.request_id] = sequences
        for seq in sequences:
            if params.grammar is not None:
                seq.matcher = self._grammars.start(params.grammar)
            self._detokenizers[seq] = IncrementalDetokenizer(self.tokenizer, params, request.prompt_token_ids)
        if self._arrivals is None or not self._arrivals.begin(sequences, len(self.scheduler.running)):
            self._queue(sequences)

    def _queue(self, sequences: Iterable[Sequence]) -> None:
        for seq in sequences:
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is; unknown ids are ignored."""
        running = [seq for seq in self._sequences.pop(request_id, []) if not seq.is_finished]
        for seq in running:
            self._end(seq, FinishReason.ABORT)
            self._forget(seq)
        if self.observer is not None and running:
            self.observer.on_aborted(len(running))
        self._report_load()

    def pause(self, request_id: str, is_paused: bool) -> None:
        """Compute nothing for a request while its client does not read; unknown ids are ignored."""
        for seq in self._sequences.get(request_id, []):
            seq.is_paused = is_paused

    def is_waiting(self, request_id: str) -> bool:
        """True while no sample of the request has been in a step. Any thread may call."""
        sequences = self._sequences.get(request_id, [])
        return bool(sequences) and all(seq.first_scheduled_s is None for seq in sequences)

    def fail_running(self, message: str) -> list[SampleOutput]:
        """End every admitted sequence with an error, after a step that raised. Waiting ones stay."""
        outputs = [self._fail(seq, MoEServeError(message)) for seq in list(self.scheduler.running)]
        self._report_load()
        return outputs

    def _fail(self, seq: Sequence, error: MoEServeError) -> SampleOutput:
        self._end(seq, FinishReason.ERROR)
        self._forget(seq)
        return output_of(seq, "", error)

    def _report_load(self) -> None:
        if self.observer is not None:
            scheduler = self.scheduler
            num_saved = scheduler.prefixes.saved.num_used
            num_waiting = len(scheduler.waiting) + len(self._arriving())
            load = EngineLoad(len(scheduler.running), num_waiting, self.pool.usage_frac, num_saved)
            if self._arrivals is not None:
                load = replace(load, disk=self._arrivals.tier.totals)
            self.observer.on_load(load)

    def _arriving(self) -> list[Sequence]:
        return [] if self._arrivals is None else self._arrivals.live()

    def resize_expert_cache(self, moe_cache_mib: int) -> None:
        """Change the memory for experts, between steps. InvalidRequestError says why it cannot be."""
        try:
            self.runner.experts.resize(moe_cache_mib)
        except ResizeError as error:
            raise InvalidRequestError("mib", error.message) from error

    def expert_report(self) -> ExpertReport | None:
        """What the experts have done so far; None for a runner that does not tell. Any thread may call."""
        return self.runner.experts.report()

    def routing_shape(self) -> RouterShape:
        """What routes look like in this model."""
        return RouterShape(self.runner.moe_layer_ids(), self.spec.num_experts, self.spec.top_k)

    def observe_routes(self, observer: RouteObserver, wanted: bool = True) -> None:
        """From the next step on, tell `observer` where tokens went, or stop to. Without observers it costs nothing."""
        others = [known for known in self._route_observers if known is not observer]
        self._route_observers = [*others, observer] if wanted else others
        weights = any(known.wants_weights for known in self._route_observers)
        self.runner.observe_routes(bool(self._route_observers), weights)

    def close(self) -> None:
        """Stop the threads behind the model; the engine is of no use afterwards."""
        if self._arrivals is not None:
            self._arrivals.tier.close()
        self.runner.close()
        self._grammars.close()

    def trouble(self) -> Trouble | None:
        """Why it cannot serve now; on one device nothing but death keeps it from that."""
        return None

    def has_work(self) -> bool:
        return self.scheduler.has_work() or bool(self._arriving())

    # ---- the loop -----------------------------------------------------------------------------------

    def step(self) -> list[SampleOutput]:
        """Plan, run, apply; returns what each sequence that got a token gained."""
        if self._arrivals is not None:
            self._queue(self._arrivals.landed(is_idle=not self.scheduler.has_work()))
        recorder = StepRecorder(self.runner.experts, self.observer)
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan.is_empty:
            return []
        recorder.planned(plan)
        result = self.runner.run(plan)
        now = time.monotonic()
        advanced = self.scheduler.update(plan, result)
        if self._speculator is not None:
            self._speculator.learn(plan, time.perf_counter() - start)
        recorder.stamp(advanced, now)
        if result.routes is not None:
            for observer in self._route_observers:
                observer.on_routes(plan, result)
        outputs = [self._emit(seq) for seq in advanced]
        recorder.report(outputs)
        outputs += [self._fail(seq, told(seq, e)) for seq, e in result.errors.items() if not seq.is_finished]
        self._report_load()
        return outputs

    def _emit(self, seq: Sequence) -> SampleOutput:
        """Text of the newest tokens; may end the sequence at a stop string."""
        if not seq.num_generated:  # only the prompt was wanted
            self._forget(seq)
            return output_of(seq, "")
        detokenizer = self._detokenizers[seq]
        text, stop, starts = detokenizer.push_each(seq.token_ids[-seq.num_new :])
        seq.drop_newest(seq.num_new - len(starts))
        if stop is not None:
            if seq.is_finished:
                seq.finish_reason, seq.stop_reason = FinishReason.STOP, stop
            else:
                self._end(seq, FinishReason.STOP, stop)
        elif seq.is_finished:
            text += detokenizer.flush()
        output = output_of(seq, text, starts=starts)
        if seq.is_finished:
            self._forget(seq)
        return output

    def _end(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.scheduler.finish(seq, reason, stop_reason)

    def _forget(self, seq: Sequence) -> None:
        """Drop the engine's references to an ended sequence."""
        self._detokenizers.pop(seq, None)
        if self._arrivals is not None and seq.finish_reason is not FinishReason.ERROR:
            self._arrivals.tier.keep(seq)
        if seq.matcher is not None:
            seq.matcher.close()
        siblings = self._sequences.get(seq.request.request_id)
        if siblings is not None and all(s.is_finished for s in siblings):
            del self._sequences[seq.request.request_id]

    def check_integrity(self) -> None:
        """Prove that pages, sequences and detokenisers agree; AssertionError says what does not."""
        live = [*self.scheduler.live(), *self._arriving()]
        held, rows = ([], []) if self._arrivals is None else (self._arrivals.held_pages(), self._arrivals.held_rows())
        self.pool.check_integrity([*(seq.page_ids for seq in live), *held])
        self.scheduler.seats.check_integrity(seq.seat for seq in live)
        self.scheduler.prefixes.check_integrity(rows)
        assert set(self._detokenizers) == set(live), "detokenisers of ended sequences are left"
        listed = [s for seqs in self._sequences.values() for s in seqs if not s.is_finished]
        assert set(listed) == set(live), "the request table and the scheduler disagree"


def _limits(config: EngineConfig) -> SchedulerLimits:
    return SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
        enable_prefix_caching=config.kv.enable_prefix_caching,
        max_num_batched_seqs=config.max_num_batched_seqs,
        state_block=config.kv.state_block_size,
        num_saved_states=config.kv.num_saved_states or 0,
    )
