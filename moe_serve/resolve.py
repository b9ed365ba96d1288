"""Turning "auto" into numbers, once model and machine are known. Pure functions of both.

Returns new configs and never changes one. Knows memory sizes and CPU features, not requests.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from expert_cache.gpu_managed.layout import device_bytes
from expert_cache.storage.store import ExpertStore
from moe_serve.config import EngineConfig
from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError
from moe_serve.execution.decode_graphs import sizes_up_to, widths_up_to
from moe_serve.execution.kv_cache import LayerKVShape, bytes_per_token
from moe_serve.execution.state_cache import StateShapes, bytes_per_sequence
from moe_serve.execution.step_memory import Shares, StepShape, divide, step_bytes
from moe_serve.memory import free_bytes
from moe_serve.spec import ModelSpec
from moe_serve_kernels import gpu
from moe_serve_kernels.cpu import library

log = logging.getLogger(__name__)

KV_SHARE_OF_FREE = 0.25
EXPERT_SHARE_OF_FREE = 0.70
STATE_SHARE_OF_FREE = 0.50
SAVED_SHARE_OF_FREE = 0.10
STATE_BLOCK = 256
"""Tokens: a multiple of the chunks that recurrent layers are computed in, and few enough for common prefixes."""


def device_of(config: EngineConfig) -> torch.device:
    """The device to run on; ConfigError if it is not there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; use --device cpu or install a CUDA build of torch")
    return device


def dtype_of(config: EngineConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The compute type; see EngineConfig.dtype for what auto means."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    return torch.float32 if device.type == "cpu" else spec.dtype


def has_native_bf16() -> bool:
    """True on CPUs with bf16 dot products (AVX512-BF16, AMX). Emulated ones are slower than fp32."""
    cpu = torch.cpu
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(cpu, name)() for name in probes if hasattr(cpu, name))


def num_threads_of(config: EngineConfig) -> int:
    """Threads to compute with; the default respects this process's CPU affinity."""
    return config.num_threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class SequenceMemory:
    """What a model keeps of a sequence."""

    kv_shapes: dict[int, LayerKVShape]
    """Per token."""
    state_shapes: StateShapes
    """Whatever its length."""
    continues_runs: bool = True
    """False: only the first block of a prompt is computed fast (moe_serve/hf/recurrent.py)."""


def resolve(
    config: EngineConfig,
    spec: ModelSpec,
    store: ExpertStore,
    memory: SequenceMemory,
    dtype: torch.dtype,
    device: torch.device,
) -> EngineConfig:
    """`config` with every "auto" and None that the engine reads replaced by a number.

    ConfigError when the settings contradict each other or the machine.
    """
    if config.experts.cpu_misses and device.type == "cpu" and not gpu.is_available(device):
        raise ConfigError("--moe-cpu-misses needs a GPU; without one the CPU computes everything anyway")
    max_model_len = _max_model_len(config, spec)
    config, free = _with_states(config, memory, _token_budget(config, max_model_len), free_bytes(device))
    page_bytes = bytes_per_token(memory.kv_shapes, dtype) * config.kv.page_size
    slot_bytes = device_bytes(store, dtype, device)
    everything, wanted = -(-store.num_total * slot_bytes // MIB) * MIB, _wanted_pages(config, max_model_len)
    shares = Shares(int(free * EXPERT_SHARE_OF_FREE), int(free * KV_SHARE_OF_FREE))
    if device.type != "cpu":
        step = step_bytes(step_shape(config, spec, memory.kv_shapes, max_model_len, dtype))
        shares = divide(free, step, everything, _given_pages(config, page_bytes) or wanted * page_bytes)
    num_pages = _num_kv_pages(config, wanted, page_bytes, free, shares.pages)
    max_model_len = min(max_model_len, num_pages * config.kv.page_size)
    cache_mib = _moe_cache_mib(config, everything, slot_bytes, device, shares.experts)
    _warn_of_idle_flags(config, cache_mib)
    return config.replace(
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        max_model_len=max_model_len,
        max_num_batched_tokens=_token_budget(config, max_model_len),
        num_kv_pages=num_pages,
        moe_cache_mib=cache_mib,
        num_threads=num_threads_of(config),
    )


def _with_states(
    config: EngineConfig, memory: SequenceMemory, token_budget: int, free: int
) -> tuple[EngineConfig, int]:
    """`config` with what recurrent layers need, and what is free beside it."""
    row_bytes = bytes_per_sequence(memory.state_shapes)
    if row_bytes == 0:
        return config.replace(state_block_size=None, num_saved_states=0), free
    config = config.replace(state_block_size=_state_block(config, memory.continues_runs, token_budget))
    free = _less_states(free, config.max_num_seqs * row_bytes)
    rows = _num_saved_states(config, row_bytes, free)
    return config.replace(num_saved_states=rows, enable_prefix_caching=rows > 0), free - rows * row_bytes


def _state_block(config: EngineConfig, continues_runs: bool, most: int) -> int:
    """Tokens in a block. A step of `most` tokens must have room for one, else a prompt would wait for ever."""
    page = config.kv.page_size
    given = config.kv.state_block_size
    if given is not None:
        if given > most or given % page:
            raise ConfigError(
                f"--state-block-size {given} must be a multiple of --page-size ({page}) and at most"
                f" --max-num-batched-tokens ({most})"
            )
        return given
    num_decoding = config.max_num_batched_seqs or config.max_num_seqs
    room = max(most - num_decoding + 1, most // 2, 1)
    block = min(STATE_BLOCK, room) if continues_runs else room
    return max(block // page * page, min(block, page))


def _num_saved_states(config: EngineConfig, row_bytes: int, free: int) -> int:
    """0 where prefixes are not cached: a state at each end of a block needs a page that ends there."""
    kv = config.kv
    assert kv.state_block_size is not None
    if not kv.enable_prefix_caching:
        return 0
    if kv.state_block_size % kv.page_size:
        log.info(
            "prefix caching is off: this model's states are kept at the ends of pages, and a step has no room for one;"
            " raise --max-num-batched-tokens"
        )
        return 0
    if kv.num_saved_states is not None:
        return kv.num_saved_states
    if kv.state_cache_mib is not None:
        return kv.state_cache_mib * MIB // row_bytes
    return min(2 * config.max_num_seqs, int(free * SAVED_SHARE_OF_FREE) // row_bytes)


def _less_states(free: int, state_bytes: int) -> int:
    """What is free beside the states of --max-num-seqs sequences; ConfigError if these do not fit."""
    if state_bytes > free * STATE_SHARE_OF_FREE:
        raise ConfigError(
            f"the states of --max-num-seqs sequences take {state_bytes // MIB} MiB, and {free // MIB} MiB are free;"
            " lower --max-num-seqs"
        )
    return free - state_bytes


def _warn_of_idle_flags(config: EngineConfig, cache_mib: int) -> None:
    """Settings of a cache that this machine does not need. To refuse them would tie a command line to a machine."""
    idle = config.experts.replace(cache_mib=cache_mib).no_effect()
    if config.experts.cache_mib is None and idle is not None:
        log.warning("all experts fit in memory, so there is no expert cache: %s", idle)


def _max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    limit = spec.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} exceeds the model's {limit} positions"
            " (max_position_embeddings and yarn's factor in config.json)"
        )
    return config.max_model_len or limit


def _wanted_pages(config: EngineConfig, max_model_len: int) -> int:
    """For --max-num-seqs full sequences."""
    return config.max_num_seqs * -(-max_model_len // config.kv.page_size)


def _given_pages(config: EngineConfig, page_bytes: int) -> int | None:
    """Bytes of the pages that the user asks for; None: whatever there is room for."""
    if config.kv.num_pages is not None:
        return config.kv.num_pages * page_bytes
    return None if config.kv.cache_mib is None else config.kv.cache_mib * MIB // page_bytes * page_bytes


def _num_kv_pages(config: EngineConfig, wanted: int, page_bytes: int, free: int, share: int) -> int:
    """Enough for max_num_seqs full sequences, within the memory given or the pages' share of what is free."""
    given = _given_pages(config, page_bytes)
    pages = min(wanted, share // page_bytes) if given is None else given // page_bytes
    if pages < 1:
        raise ConfigError(f"no memory for a single KV page of {page_bytes} bytes; raise --kv-cache-mib")
    if pages * page_bytes > free:
        raise ConfigError(
            f"{pages} KV pages take {pages * page_bytes // MIB} MiB, and {free // MIB} MiB are free; lower"
            " --kv-cache-mib or --num-kv-pages"
        )
    return pages


def step_shape(
    config: EngineConfig,
    spec: ModelSpec,
    kv_shapes: dict[int, LayerKVShape],
    max_model_len: int,
    dtype: torch.dtype | None = None,
) -> StepShape:
    """What the largest steps depend on; without `dtype`, that of a resolved `config`."""
    dtype = dtype or getattr(torch, config.dtype)
    rows = config.max_num_batched_seqs or config.max_num_seqs
    widths = widths_up_to(max_model_len, config.kv.page_size)
    latent_dims = (shape.key_dim for shape in kv_shapes.values() if shape.values_in_keys)
    return StepShape(
        num_tokens=_token_budget(config, max_model_len),
        num_seqs=rows,
        num_graphs=0 if config.enforce_eager else len(sizes_up_to(rows)) * len(widths),
        num_layers=spec.num_layers,
        hidden=spec.hidden_size,
        inner=spec.expert_intermediate_size,
        top_k=spec.top_k,
        vocab=spec.vocab_size,
        latent_dim=max(latent_dims, default=0),
        max_model_len=max_model_len,
        itemsize=dtype.itemsize,
    )


def _token_budget(config: EngineConfig, max_model_len: int) -> int:
    """Without chunked prefill, a step must be able to take the longest prompt whole."""
    if config.enable_chunked_prefill:
        return config.max_num_batched_tokens
    return max(config.max_num_batched_tokens, max_model_len)


def _moe_cache_mib(config: EngineConfig, all_bytes: int, slot_bytes: int, device: torch.device, share: int) -> int:
    """On a CPU, experts that fit are best used where they are mapped: 0. See ExpertCacheConfig.cache_mib."""
    everything = all_bytes // MIB
    fits = all_bytes <= share
    budget = config.experts.cache_mib
    if budget is None:
        if fits:
            return 0 if device.type == "cpu" else everything
        budget = share // MIB
    if device.type != "cpu" and budget == 0:
        raise ConfigError("--moe-cache-mib 0 works on a CPU only: a GPU cannot compute from the mapped checkpoint")
    if 0 < budget * MIB < slot_bytes:
        raise ConfigError(
            f"--moe-cache-mib {budget} does not hold a single expert; give at least {-(-slot_bytes // MIB)}"
        )
    return min(budget, everything)


def computing(config: EngineConfig) -> dict[str, str]:
    """How a resolved `config` computes, for logs and metrics: results depend on it to the bit.

    instruction_set: that of the C++ kernels; "torch" where they are not used.
    """
    native = library.load() if config.device == "cpu" else None
    return {
        "device": config.device,
        "dtype": config.dtype,
        "instruction_set": "torch" if native is None else native.isa,
        "threads": str(config.num_threads),
    }
