"""ModelRunner: executes a BatchPlan. Owns the model, its KV tensors and its experts.

The middle of plan, run, apply. Knows nothing of queues, requests or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from expert_cache.running.experts import Experts
from moe_serve.config import EngineConfig
from moe_serve.engine.mapped_files import MappedFiles
from moe_serve.execution import broken_logits, forward_batch, prompt_logprobs, sampler
from moe_serve.execution.cuda_graph import Capture
from moe_serve.execution.current_device import on_device
from moe_serve.execution.decode_graphs import DecodeGraphs, StepInputs, sizes_up_to, widths_up_to
from moe_serve.execution.kv_cache import KVCache, LayerKVShape
from moe_serve.execution.state_cache import StateCache
from moe_serve.grammars.masks import MaskThread
from moe_serve.hf import attend, device_routers, recurrent, whole_steps
from moe_serve.hf.experts import connect
from moe_serve.hf.loading import LoadedModel
from moe_serve.hf.routers import find_routers
from moe_serve.hf.whole_steps import WholeSteps
from moe_serve.prefix_disk.open import PrefixFacts
from moe_serve.scheduling.batch_plan import BatchPlan, DraftedPosition, Sampled, StepError, StepResult, StepRoutes
from moe_serve.scheduling.sequence import Sequence as Seq
from moe_serve.spec import ModelSpec
from moe_serve_kernels import gpu

if TYPE_CHECKING:
    from moe_serve.hf.device_steps import DeviceSteps

log = logging.getLogger(__name__)

PADDING_LIMIT = 1.25
L2_BYTES = 512 << 10
"""Gathered keys and values are read right after they are written: half a common L2 holds them."""


class ModelRunner:
    """One model on one device; `run` turns a plan into sampled tokens."""

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        spec: ModelSpec,
        eos_token_ids: frozenset[int],
        experts: Experts[BatchPlan],
    ) -> None:
        """`config` must be resolved (moe_serve.resolve.resolve)."""
        assert config.kv.num_pages is not None
        self.config = config
        self.device = torch.device(config.device)
        dtype: torch.dtype = getattr(torch, config.dtype)
        self.model = loaded.model
        self.loaded = loaded
        self.spec = spec
        self.experts = experts
        # The page beyond the scheduler's is where rows that only fill up a graph's batch write.
        self.kv_cache = KVCache(loaded.kv_shapes, config.kv.num_pages + 1, config.kv.page_size, dtype, self.device)
        self.states = StateCache(loaded.state_shapes, config.max_num_seqs, config.kv.num_saved_states or 0, self.device)
        self._group_limits = _group_limits(loaded.kv_shapes, dtype, self.device)
        self.eos_token_ids = eos_token_ids
        self.masks = MaskThread(spec.vocab_size)
        self._graphs: DecodeGraphs | None = None
        self._whole_steps: WholeSteps | DeviceSteps | None = None
        self._files = MappedFiles()
        connect(self.model, experts)
        recurrent.connect(self.model, self.states)
        if experts.padding is not None:
            device_routers.install(self.model, loaded.family.routing(loaded.hf_config), spec.num_experts)

    def prefix_facts(self) -> PrefixFacts:
        """What a prefix cache on disk has to know."""
        return PrefixFacts(self.config, self.kv_cache, self.states)

    def watch(self, files: MappedFiles) -> None:
        """From now on, steps raise CheckpointChangedError once one of these was written to."""
        self._files = files

    def run_whole_steps(self) -> None:
        """From now on run steps without the model's modules, where there are kernels for that. Only for a
        runner that has all experts."""
        if self.config.enforce_eager:
            return
        dtype, page_size = getattr(torch, self.config.dtype), self.config.kv.page_size
        if self.experts.padding is not None or not whole_steps.is_available(self.device, dtype):
            self._whole_steps = self._device_steps(dtype)
        else:
            routers = find_routers(self.model, self.spec.num_experts, self.spec.hidden_size)
            self._whole_steps = whole_steps.whole_steps(self.loaded, self.kv_cache, self.experts, routers, page_size)

    def _device_steps(self, dtype: torch.dtype) -> DeviceSteps | None:
        if not gpu.is_available(self.device) or attend.in_place_kernel(self.device, dtype) is None:
            return None
        from moe_serve.hf.device_steps import device_steps  # needs triton, which machines without a GPU may lack

        assert self.config.max_model_len is not None
        sizes = self.config.kv.page_size, self.config.max_model_len
        return device_steps(self.loaded, self.kv_cache, self.experts, *sizes)

    def capture_decoding(self, capture: Capture) -> None:
        """From now on replay decoding steps as graphs. RuntimeError: a step cannot be captured; nothing has changed."""
        config, padding = self.config, self.experts.padding
        assert config.kv.num_pages is not None
        assert config.max_model_len is not None
        assert padding is not None
        if self.loaded.state_shapes:
            raise RuntimeError("recurrent layers keep states that graphs do not know")
        sizes = sizes_up_to(config.max_num_batched_seqs or config.max_num_seqs)
        widths = widths_up_to(config.max_model_len, config.kv.page_size)
        inputs = StepInputs(sizes[-1], widths[-1], config.kv.page_size, config.kv.num_pages, self.device)
        self._graphs = DecodeGraphs(sizes, widths, inputs, self._forward, padding, capture)
        log.info("captured %d decoding steps in %.1f s", len(sizes) * len(widths), self._graphs.capture_s)

    def close(self) -> None:
        """Stop reading threads; the runner is of no use afterwards."""
        self.experts.close()
        self.masks.close()
        self._files.close()

    @torch.inference_mode()
    def run(self, plan: BatchPlan) -> StepResult:
        """Compute the plan's tokens and sample where a sequence has caught up. CheckpointChangedError."""
        self._files.check()
        with on_device(self.device):
            return self._run(plan)

    def _run(self, plan: BatchPlan) -> StepResult:
        self.experts.between_steps()
        self.experts.routes.clear()
        self.experts.begin_step(plan)
        graphs = self._graphs_for(plan)
        device = self.device if graphs is None else torch.device("cpu")
        kv = self.config.kv
        batch = forward_batch.make(plan, kv.page_size, device, self._group_limits, kv.state_block_size)
        positions = plan.positions()
        rows = [positions[i] for i in batch.sample_order]
        pending = self.masks.start([row.seq if isinstance(row, DraftedPosition) else row for row in rows])
        scored = forward_batch.scored_rows(plan)
        logits = self._forward(batch, scored) if graphs is None else graphs.run(batch)
        broken = broken_logits.find(logits, [*batch.sample_rows.tolist(), *scored])
        logits, prompt_logits = logits[: len(rows)], logits[len(rows) :]
        masks = pending.result() if pending is not None else None
        tokens, logprobs = sampler.sample(logits, rows, self.config.seed, self.eos_token_ids, masks)
        by_plan = sorted(zip(batch.sample_order, tokens, logprobs, strict=True), key=lambda row: row[0])
        wrong = broken | {row: error.message for row, error in self.experts.take_failures().items()}
        errors = self._errors(plan, wrong) | (masks.errors if masks is not None else {})
        own, drafted = _divide(plan, [(token, logprob) for _, token, logprob in by_plan], wrong)
        return StepResult(
            tuple(token for token, _ in own),
            tuple(logprob for _, logprob in own),
            errors,
            self._routes(plan),
            prompt_logprobs.score(prompt_logits, plan) if scored else {},
            drafted,
            masks.late if masks is not None else frozenset(),
        )

    def _errors(self, plan: BatchPlan, wrong: Mapping[int, str]) -> dict[Seq, StepError]:
        """`wrong`: by row of the batch. What is wrong with a draft alone ends no sequence."""
        drafts = forward_batch.draft_rows(plan)
        found = forward_batch.by_sequence(plan, {row: text for row, text in wrong.items() if row not in drafts})
        for seq, message in found.items():
            log.error("request %s ends with an error: %s", seq.request.request_id, message)
        return {seq: StepError(message) for seq, message in found.items()}

    def _graphs_for(self, plan: BatchPlan) -> DecodeGraphs | None:
        """The graphs, if they can run this plan. A graph does not tell the routes that an observer wants."""
        if self._graphs is None or self.experts.routes.is_on or not self._graphs.takes(plan):
            return None
        return self._graphs

    def _routes(self, plan: BatchPlan) -> StepRoutes | None:
        routes = self.experts.routes
        return StepRoutes(*routes.take(), forward_batch.rows_of(plan)) if routes.is_on else None

    def moe_layer_ids(self) -> tuple[int, ...]:
        """Each MoE layer's index in the checkpoint."""
        return self.loaded.store.decoder_layers

    def observe_routes(self, wanted: bool, weights: bool = False) -> None:
        """From the next step on, put routes into the StepResult, or stop to; `weights`: those of the router too."""
        self.experts.routes.is_on = wanted
        self.experts.routes.keeps_weights = weights

    def _forward(self, batch: forward_batch.ForwardBatch, scored: Sequence[int] = ()) -> torch.Tensor:
        """Logits [rows to sample + scored rows, V]: the first in batch order, the others in theirs."""
        rows = batch.sample_rows
        if scored:
            rows = torch.cat([rows, torch.tensor(scored, dtype=torch.int64, device=self.device)])
        if self._whole_steps is not None:
            return self._whole_steps.run(batch, rows)
        self.states.begin(batch)
        output = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=rows,
            forward_batch=batch,
            kv_cache=self.kv_cache,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


def _divide(
    plan: BatchPlan, sampled: Sequence[Sampled], wrong: Mapping[int, str]
) -> tuple[list[Sampled], dict[Seq, tuple[Sampled, ...]]]:
    """What was sampled behind the sequences, and behind drafts of theirs unless a row of the sequence went wrong."""
    if not plan.num_drafts:
        return list(sampled), {}
    failed = forward_batch.by_sequence(plan, wrong)
    rest = iter(sampled)
    own: list[Sampled] = []
    drafted: dict[Seq, tuple[Sampled, ...]] = {}
    for item in plan.scheduled:
        if item.needs_sample:
            own.append(next(rest))
            behind = tuple(next(rest) for _ in item.drafts)
            if behind and item.seq not in failed:
                drafted[item.seq] = behind
    return own, drafted


def _group_limits(
    kv_shapes: dict[int, LayerKVShape], dtype: torch.dtype, device: torch.device
) -> forward_batch.GroupLimits:
    """An in-place kernel takes everything at once; gathering wants little padding and, on CPU, L2-sized groups."""
    if attend.in_place_kernel(device, dtype) is not None:
        return forward_batch.GroupLimits()
    if device.type != "cpu":
        return forward_batch.GroupLimits(max_padding=PADDING_LIMIT)
    token_bytes = max(s.elements_per_token for s in kv_shapes.values()) * dtype.itemsize
    return forward_batch.GroupLimits(max_tokens=L2_BYTES / token_bytes, max_padding=PADDING_LIMIT)
