"""WholeSteps: steps on a CPU without the model's modules.

A step is one call for all layers if no expert can be missing: one for a few sequences that decode one token each, one
for every other step, with parts of prompts or many sequences. Otherwise `Experts.run` runs each layer's experts; what
is before them is one call for a few sequences, and several for other steps. All give a token the same bits, whatever
else is in the step. The counterpart of decode_graphs.py. Knows steps and kernels; nothing of requests.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from expert_cache.running.experts import Experts
from expert_cache.running.in_place import InPlaceExperts
from moe_serve.execution.forward_batch import ForwardBatch
from moe_serve.execution.kv_cache import KVCache
from moe_serve.execution.team_size import TeamSize
from moe_serve.hf import decoder_blocks, rope
from moe_serve.hf.experts import moe_layers
from moe_serve.hf.loading import LoadedModel
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve_kernels.cpu import decode_step
from moe_serve_kernels.cpu.decode_step import DecodeStep, most_tokens
from moe_serve_kernels.cpu.decoder import DecodeInputs
from moe_serve_kernels.cpu.layer_parts import LayerParts
from moe_serve_kernels.cpu.native_model import NativeModel
from moe_serve_kernels.cpu.prompt_step import PromptStep
from predictors.methods.next_gate import Router

log = logging.getLogger(__name__)


class RotaryTable:
    """Cosines and sines [positions, rotary_dim / 2] of a model's rotary embedding, made as positions are reached."""

    def __init__(self, embedding: Any, rotary_dim: int) -> None:
        """`embedding`: the model's own, called with positions."""
        self._embedding = embedding
        self._half = rotary_dim // 2
        self._turns = torch.empty(2, 0, self._half)

    def at(self, positions: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of `positions` [T], none beyond `last`."""
        known = self._turns.shape[1]
        if last >= known:
            self._grow(max(2 * known, last + 1, 512))
        cos, sin = self._turns.index_select(1, positions)
        return cos, sin

    def _grow(self, count: int) -> None:
        self._turns = torch.stack(rope.table_of(self._embedding, self._turns[0], count, self._half))


class WholeSteps:
    """One model's steps."""

    def __init__(
        self,
        loaded: LoadedModel,
        kv_cache: KVCache,
        experts: Experts[BatchPlan],
        routers: Sequence[Router],
        page_size: int,
    ) -> None:
        """`routers`: one for every layer with experts. The family must be one that `decoder_blocks.why_not` takes."""
        model: Any = loaded.model
        self._model = model
        self._config = loaded.hf_config
        self._kv_cache = kv_cache
        self._experts = experts
        self._moe_layers = moe_layers(loaded.model)
        self._routers = dict(zip(self._moe_layers, routers, strict=True))
        activation = loaded.family.activation(self._config)
        self._shape = decoder_blocks.shape_of(model, loaded.family, self._config, activation, page_size)
        self._rotary = RotaryTable(model.model.rotary_emb, self._shape.rotary_dim)
        self._embedding_scale = getattr(self._config, "embedding_multiplier", 1.0)
        self._logits_divisor = getattr(self._config, "logits_scaling", 1.0)
        self._team = TeamSize(torch.get_num_threads())
        self._in_place = experts.in_place()
        self._few, self._many, self._prompts = self._new_steps()

    def _new_steps(self) -> tuple[DecodeStep, LayerParts, PromptStep]:
        model, found = self._model, self._in_place
        in_place = {} if found is None else {i: found.layers[layer] for i, layer in self._moe_layers.items()}
        blocks = decoder_blocks.blocks_of(model, self._config, self._kv_cache, self._routers, in_place)
        rounds = next(iter(self._kv_cache.layers.values())).keys.dtype == torch.bfloat16
        head = decoder_blocks.weights_of(model.lm_head, rounds)
        native = NativeModel(self._shape, blocks, model.model.norm.weight.float(), head)
        return DecodeStep(native), LayerParts(native), PromptStep(native)

    def run(self, batch: ForwardBatch, rows: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of the tokens `rows` [n]; overwritten by the next step of as many tokens."""
        in_place = self._follow()
        inputs = self._inputs(batch)
        with nullcontext() if in_place is None else self._threads(batch):
            run = self._run_few if _are_few(batch) else self._run_many
            logits = run(inputs, rows, in_place)
        return logits if self._logits_divisor == 1 else logits.div_(self._logits_divisor)

    @contextmanager
    def _threads(self, batch: ForwardBatch) -> Iterator[None]:
        """As many of the process's threads as make a step fastest beside other processes."""
        size = self._team.next()
        start = time.perf_counter()
        if size < self._team.most:
            torch.set_num_threads(size)
        try:
            yield
        finally:
            if size < self._team.most:
                torch.set_num_threads(self._team.most)
        self._team.took(_kind(batch), time.perf_counter() - start)

    def _inputs(self, batch: ForwardBatch) -> DecodeInputs:
        page_table, lengths, starts = _contexts(batch)
        cos, sin = self._rotary.at(batch.positions[0], int(lengths.max()) - 1)
        x = self._model.model.embed_tokens(batch.input_ids[0]).float()
        # Embedded tokens are added to in place.
        x = x * self._embedding_scale if self._embedding_scale != 1 else x.contiguous()
        return DecodeInputs(x, cos, sin, batch.kv_slots, page_table, lengths, starts)

    def _follow(self) -> InPlaceExperts | None:
        """The experts in place now: they change when a cache with room for all has filled, or is resized."""
        in_place = self._experts.in_place()
        if in_place is not self._in_place:
            self._in_place = in_place
            self._few, self._many, self._prompts = self._new_steps()
        return in_place

    def _run_few(self, inputs: DecodeInputs, rows: torch.Tensor, in_place: InPlaceExperts | None) -> torch.Tensor:
        logits = self._run_by_layer(inputs) if in_place is None else self._run_at_once(inputs, in_place)
        return logits if len(rows) == len(logits) else logits[rows]

    def _run_at_once(self, inputs: DecodeInputs, experts: InPlaceExperts) -> torch.Tensor:
        logits, ids, weights = self._few.run(inputs)
        experts.have_run(ids, weights)
        return logits

    def _run_by_layer(self, inputs: DecodeInputs) -> torch.Tensor:
        self._run_layers(self._few, inputs)
        return self._few.head(inputs)

    def _run_many(self, inputs: DecodeInputs, rows: torch.Tensor, in_place: InPlaceExperts | None) -> torch.Tensor:
        if in_place is None:
            self._run_layers(self._many, inputs)
        else:
            in_place.have_run(*self._prompts.run(inputs))
        return self._many.head(inputs.x[rows])

    def _run_layers(self, step: DecodeStep | LayerParts, inputs: DecodeInputs) -> None:
        for decoder_layer in range(len(self._kv_cache.layers)):
            hidden, ids, weights = step.until_experts(decoder_layer, inputs)
            layer = self._moe_layers.get(decoder_layer)
            if layer is not None:
                shared = functools.partial(step.shared, decoder_layer, inputs)
                mixed = self._experts.run(layer, hidden, ids, weights, meanwhile=shared)
                inputs.x.add_(mixed.mul_(self._shape.residual_scale))


def _are_few(batch: ForwardBatch) -> bool:
    """Every sequence decodes one token, without drafts, and they are few."""
    return batch.num_tokens <= most_tokens() and not batch.prefill_runs and batch.decode_starts is None


def _kind(batch: ForwardBatch) -> tuple[bool, int]:
    """Of steps that take about as long: with parts of prompts or without, and how many tokens."""
    count = batch.num_tokens
    return bool(batch.prefill_runs), count if _are_few(batch) else 1 << count.bit_length()


def _contexts(batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Page table [S, pages], lengths [T] of what each token sees, and where sequences start [S + 1], or None where
    every token is one."""
    groups, runs, decode_starts = batch.decode_groups, batch.prefill_runs, batch.decode_starts
    if len(groups) == 1 and not runs and decode_starts is None:
        return groups[0].page_table, groups[0].lengths, None
    tables = [*(group.page_table for group in groups), *(run.pages[None] for run in runs)]
    page_table = torch.zeros(sum(map(len, tables)), max(table.shape[1] for table in tables), dtype=torch.int64)
    first = 0
    for table in tables:
        page_table[first : first + len(table), : table.shape[1]] = table
        first += len(table)
    num_rows = sum(group.num_seqs for group in groups)
    if decode_starts is not None:
        # A sequence has as many rows as its drafts make; the last one's pages are those of all.
        last = [*(start - 1 for start in decode_starts[1:]), *range(num_rows - 1, len(page_table))]
        page_table = page_table[last]
    starts = [*(decode_starts or range(num_rows)), *(run.first_row for run in runs), batch.num_tokens]
    return page_table, batch.positions[0] + 1, torch.tensor(starts)


def whole_steps(
    loaded: LoadedModel, kv_cache: KVCache, experts: Experts[BatchPlan], routers: Sequence[Router], page_size: int
) -> WholeSteps | None:
    """For models on a CPU whose layers the kernels know; None, and a line in the log, for others."""
    reason = decoder_blocks.why_not(loaded.family, loaded.hf_config)
    if reason is None and len(routers) != len(loaded.store.layers):
        reason = "some layers have no router beside their experts"
    if reason is not None:
        log.info("steps run module by module, not kernel by kernel, because %s", reason)
        return None
    return WholeSteps(loaded, kv_cache, experts, routers, page_size)


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when this machine has the kernel for activations of `dtype`."""
    return decode_step.is_available(device, dtype)
