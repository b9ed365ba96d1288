"""Loading a ModelRunner: a checkpoint's model, its experts, and the fastest way to run its steps on this machine.

Knows devices and configs; knows nothing of queues, requests or HTTP.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from expert_cache.storage.direct_io import drop_cached_pages
from moe_serve import resolve
from moe_serve.config import EngineConfig
from moe_serve.engine import warm_up
from moe_serve.engine.mapped_files import MappedFiles
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution.cuda_graph import CudaCapture
from moe_serve.execution.step_memory import step_bytes
from moe_serve.hf import attend, dense, loading, rope
from moe_serve.hf.checkpoint import weight_files
from moe_serve.hf.config_file import read_config
from moe_serve.hf.loading import LoadedModel
from moe_serve.offload import build
from moe_serve.spec import ModelSpec

log = logging.getLogger(__name__)


def load_model(config: EngineConfig) -> tuple[EngineConfig, LoadedModel, ModelSpec]:
    """Load the checkpoint `config` names; the config that comes back is the resolved one."""
    device = resolve.device_of(config)
    torch.set_num_threads(resolve.num_threads_of(config))
    hf_config = read_config(config.model)
    spec = ModelSpec.from_hf(hf_config)
    dtype = resolve.dtype_of(config, spec, device)
    loaded = loading.load(config.model, hf_config, spec, dtype, device, config.experts.expert_file)
    recurrence = loaded.family.recurrence
    memory = resolve.SequenceMemory(
        loaded.kv_shapes, loaded.state_shapes, recurrence is None or recurrence.continues_runs
    )
    resolved = resolve.resolve(config, spec, loaded.store, memory, dtype, device)
    assert resolved.max_model_len is not None
    rope.fix_length(loaded.model, resolved.max_model_len)
    if device.type != "cpu" and loaded.family.tabulates_rotary:
        rope.tabulate(loaded.model, resolved.max_model_len, device)
    if resolved.experts.cache_mib and device.type == "cpu":
        dense.copy_from_files(loaded.model)
        if not config.experts.page_cache:
            _leave_the_page_cache(config.model)
    return resolved, loaded, spec


def load_runner(config: EngineConfig, eos_token_ids: frozenset[int]) -> ModelRunner:
    """A runner with all of a model's experts, in the fastest way of this machine."""
    resolved, loaded, spec = load_model(config)
    runner = ModelRunner(resolved, loaded, spec, eos_token_ids, build.experts(resolved, loaded, spec))
    runner.run_whole_steps()
    if runner.device.type == "cuda":
        _warm_up(runner)
    if runner.device.type == "cuda" and not config.enforce_eager:
        _capture(runner)
    runner.watch(mapped_files(resolved))
    return runner


def mapped_files(config: EngineConfig) -> MappedFiles:
    """What a model with this resolved config computes from where it is mapped: all of it on a CPU without a budget for
    experts, else nothing."""
    if torch.device(config.device).type != "cpu" or config.experts.cache_mib:
        return MappedFiles()
    expert_file = config.experts.expert_file
    return MappedFiles(weight_files(config.model) + ([Path(expert_file)] if expert_file else []))


def _warm_up(runner: ModelRunner) -> None:
    """Prompts up to the largest that a step takes, where the host has no books of them to keep. ConfigError."""
    config = runner.config
    assert config.kv.num_pages is not None
    assert config.max_model_len is not None
    if runner.experts.padding is None or runner.loaded.state_shapes:
        return
    largest = min(config.max_num_batched_tokens, config.kv.num_pages * config.kv.page_size, config.max_model_len - 1)
    before = torch.cuda.memory_allocated(runner.device)
    torch.cuda.reset_peak_memory_stats(runner.device)
    warm_up.warm_up(runner.run, max(1, largest), config.kv.page_size)
    shape = resolve.step_shape(config, runner.spec, runner.loaded.kv_shapes, config.max_model_len)
    warm_up.log_peak(runner.device, before, step_bytes(shape))


def _capture(runner: ModelRunner) -> None:
    """Decoding as graphs where that is possible, and a line in the log either way."""
    reason = _why_no_graphs(runner)
    if reason is None:
        try:
            runner.capture_decoding(CudaCapture(runner.device))
            return
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    log.warning("decoding steps run without CUDA graphs, one launch per operation, because %s", reason)


def _why_no_graphs(runner: ModelRunner) -> str | None:
    if runner.experts.padding is None:
        return "the host brings the experts of every layer"
    if attend.in_place_kernel(runner.device, getattr(torch, runner.config.dtype)) is None:
        return f"no attention kernel reads {runner.config.dtype} pages in place"
    return None


def _leave_the_page_cache(folder: str) -> None:
    """Where experts have a budget, nothing of the checkpoint's files stays in memory beside it."""
    for file in weight_files(folder):
        drop_cached_pages(file)
