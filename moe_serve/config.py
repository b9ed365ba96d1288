"""What the user chose: frozen settings, one help text per field, shared by CLI, docs and errors.

Flag names are vLLM's where vLLM has one. "auto" stays "auto" here; `resolve` in
moe_serve/resolve.py turns it into numbers once the model and the hardware are known, by returning
a new config. Knows no torch, no transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from expert_cache.policies import policy_names
from moe_serve.errors import ConfigError


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its own help text and allowed values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def secret_option(help: str) -> Any:
    """A setting that may be given several times and is never shown."""
    return dataclasses.field(default=(), repr=False, metadata={"help": help, "choices": None})


def _check_choices(config: Any) -> None:
    for f in dataclasses.fields(config):
        choices = f.metadata.get("choices")
        value = getattr(config, f.name)
        if choices and value not in choices:
            raise ConfigError(f"{flag_name(f.name)}: {value!r} is not one of {', '.join(choices)}")


def flag_name(field_name: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + field_name.replace("_", "-")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{flag_name(name)} must be positive, got {value}")


class FromDict:
    """Adds `from_dict`, which rejects unknown keys and suggests the nearest known one."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping; ConfigError on an unknown key."""
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{cls.__name__} has no setting {key!r}{hint}")
        return cls(**values)


@dataclass(frozen=True)
class EngineConfig(FromDict):
    """Everything the engine needs to know to load a model and run it."""

    model: str = option("", "Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json).")
    tokenizer: str | None = option(None, "Folder of the tokenizer, where it is not the model's own.")
    dtype: str = option(
        "auto",
        "Type of weights and activations. auto: the checkpoint's type on a GPU, float32 on a CPU, where a request's"
        " tokens then do not depend on the other requests of its batch.",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option("auto", "Where the model runs: auto, cpu, cuda or cuda:N.")
    max_model_len: int | None = option(
        None, "Longest sequence, prompt plus completion, in tokens. Default: the model's own limit."
    )
    max_num_seqs: int = option(128, "Most sequences in one step.")
    max_num_batched_seqs: int | None = option(
        None,
        "Most sequences that decode in one step, where that is fewer than --max-num-seqs; the others keep their KV"
        " pages and wait for a later step. Default: all.",
    )
    expert_aware_batching: str = option(
        "auto",
        "Which sequences decode when --max-num-batched-seqs leaves a choice. off: the oldest; on: those expected to"
        " share experts; auto: on while experts have to be read and a step leaves most of them unused.",
        ("off", "auto", "on"),
    )
    max_skipped_steps: int = option(
        16, "Steps in a row for which expert-aware batching may pass a sequence over; then it goes first."
    )
    max_num_batched_tokens: int = option(2048, "Token budget of one step; longer prompts are computed in chunks.")
    block_size: int = option(16, "Tokens in one KV page.")
    kv_cache_mib: int | None = option(
        None,
        "KV page memory in MiB. Default: enough for max_num_seqs full sequences, at most a quarter of free memory.",
    )
    num_kv_pages: int | None = option(None, "Number of KV pages; overrides --kv-cache-mib.")
    enable_prefix_caching: bool = option(True, "Share the KV pages of equal prompt prefixes between requests.")
    enable_chunked_prefill: bool = option(True, "Compute long prompts in chunks, beside the decoding of others.")
    moe_cache_mib: int | None = option(
        None,
        "Memory for experts on the device, in MiB: the most used stay there, the others are read from the checkpoint"
        " when they are needed. 0: no cache, experts are used where the checkpoint is mapped (CPU only)."
        " Default: all experts, or 70 % of free memory if they do not fit.",
    )
    moe_cache_manager: str = option(
        "auto",
        "Who decides which experts are in the cache. device: the GPU itself, by least recent use in each layer, so that"
        " a decoding step is one CUDA graph although experts are missing; takes pinned host memory for all experts."
        " host: this program, with every policy, pool and way of prefetching. auto: device where that can be.",
        ("auto", "device", "host"),
    )
    moe_cache_policy: str = option(
        "affinity", "Which experts the cache keeps, where the host manages it.", tuple(policy_names())
    )
    moe_cache_shadow: str | None = option(
        None, "Policies, separated by commas, whose hits on the live traffic are counted beside the real cache's."
    )
    moe_cache_pool: str = option(
        "auto",
        "How layers share the cache. global: one pool; per-layer: equal parts; quota: parts solved from"
        " --moe-cache-profile; adaptive: equal at first, then solved from recent traffic where that saves misses; auto:"
        " per-layer where every layer gets at least as many slots as a token needs, else global.",
        ("auto", "global", "per-layer", "quota", "adaptive"),
    )
    moe_cache_profile: str | None = option(
        None, "Routing trace of this model (.npz), for quotas and for policies that start from popularity."
    )
    moe_prefetch: str = option(
        "off",
        "Bring experts ahead of time while the disk or the link is idle, without evicting any. next-gate: those the"
        " next layer's router would choose now; affinity: those that usually follow this layer's; predictor: those that"
        " --moe-predictor expects.",
        ("off", "next-gate", "affinity", "predictor"),
    )
    moe_predictor: str | None = option(
        None,
        "File that `moe-serve predictor train` made from a trace of this model, for --moe-prefetch predictor and"
        " --moe-cache-policy predicted.",
    )
    moe_prefetch_audit: bool = option(
        True, "Time steps with and without prefetching now and then, and leave it off where it does not pay."
    )
    moe_page_cache: bool = option(
        False,
        "On a CPU: leave what the page cache holds of the model's files, and compute an expert that is in no slot"
        " straight from there while it is, instead of reading it from the disk. For memory to spare beside the budget.",
    )
    moe_cpu_misses: bool = option(
        False,
        "On a GPU: let the CPU compute missing experts of few tokens where that is faster than copying them, by times"
        " measured at the start. A token's last bits then depend on what was resident.",
    )
    moe_expert_file: str | None = option(
        None, "File that `moe-serve pack` made of this checkpoint: experts are read from it, whole and verified."
    )
    moe_io: str = option(
        "direct",
        "How experts are read from an expert file. direct: by our own threads, past the page cache; deepspeed: through"
        " DeepSpeed's asynchronous I/O, where it is built.",
        ("direct", "deepspeed"),
    )
    enforce_eager: bool = option(
        False,
        "Run every decoding step operation by operation through the model's modules: no captured CUDA graph on a GPU,"
        " no step in one kernel call on a CPU.",
    )
    max_num_queued_reqs: int = option(1024, "Waiting requests beyond which a new one is refused with 503.")
    max_num_queued_tokens: int | None = option(
        None, "Waiting prompt tokens beyond which a new request is refused with 503."
    )
    max_queue_wait: float | None = option(
        None,
        "Longest wait for a place in the batch, in seconds. A request that would wait longer, judging by how long"
        " recent ones took, is refused with 503; so is one that has waited that long. From then on, or when 1.7 times"
        " as many come as can be served, only as many may wait as keep the batch full, until the overload is over."
        " Default: no limit.",
    )
    max_prompt_tokens: int | None = option(
        None, "Longest prompt, in tokens; longer ones are refused with 400. Default: what the context holds."
    )
    request_timeout: float | None = option(
        None, "Seconds after which a request that has not finished is ended with an error. Default: no limit."
    )
    grammar_timeout: float = option(
        10.0, "Longest that compiling one grammar or JSON schema of a request may take, in seconds; then it is a 400."
    )
    grammar_memory_mib: int = option(
        1024,
        "Most memory that one grammar's process may take, in MiB; all together may take four times as much.",
    )
    seed: int = option(0, "Seed for requests that bring none of their own.")
    chat_template: str | None = option(None, "File with a Jinja chat template that replaces the tokenizer's.")
    generation_config: str = option(
        "auto",
        "Default sampling parameters: auto (those of the checkpoint's generation_config.json) or vllm (neutral).",
        ("auto", "vllm"),
    )
    num_threads: int | None = option(None, "CPU threads for the model. Default: the cores this process may use.")

    def __post_init__(self) -> None:
        _check_choices(self)
        _require_positive(
            self,
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_seqs",
            "max_skipped_steps",
            "max_num_batched_tokens",
            "block_size",
            "kv_cache_mib",
            "num_kv_pages",
            "num_threads",
            "max_queue_wait",
            "max_prompt_tokens",
            "request_timeout",
            "grammar_timeout",
            "grammar_memory_mib",
        )
        if self.moe_cache_mib is not None and self.moe_cache_mib < 0:
            raise ConfigError(f"--moe-cache-mib must not be negative, got {self.moe_cache_mib}")
        if self.expert_aware_batching == "on" and self.max_num_batched_seqs is None:
            raise ConfigError("--expert-aware-batching on: there is nothing to choose without --max-num-batched-seqs")
        if self.max_num_queued_reqs < 0:
            raise ConfigError(f"--max-num-queued-reqs must not be negative, got {self.max_num_queued_reqs}")
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise ConfigError(f"--device: {self.device!r} is not auto, cpu, cuda or cuda:N")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < (self.max_model_len or 0):
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-model-len"
                f" ({self.max_model_len}) when chunked prefill is off"
            )


@dataclass(frozen=True)
class ServerConfig(FromDict):
    """The HTTP side."""

    host: str = option("127.0.0.1", "Address to listen on. 0.0.0.0 listens on every interface.")
    port: int = option(8000, "Port to listen on; 0 picks a free one.")
    served_model_name: str | None = option(None, "Name clients use for the model. Default: the model folder's name.")
    recording_dir: str | None = option(
        None, "Folder for recordings of routing (POST /dump_expert_distribution_record). Default: none are made."
    )
    recording_buffer_tokens: int = option(65536, "Newest tokens that a recording of routing keeps.")
    disable_log_stats: bool = option(False, "Do not log throughput every ten seconds.")
    dashboard: bool = option(True, "Serve the live page at /dashboard.")
    uvicorn_log_level: str = option(
        "info", "Log level of the HTTP server.", ("critical", "error", "warning", "info", "debug")
    )
    api_key: tuple[str, ...] = secret_option(
        "Key that clients must send as `Authorization: Bearer KEY`. Other users of this machine can read it in the"
        " process list: --api-key-file and the variable MOE_SERVE_API_KEY are safer."
    )
    api_key_file: str | None = option(None, "File with one API key per line.")
    allowed_origins: tuple[str, ...] = option((), "Web origin whose pages may call this server (CORS); * allows all.")
    max_body_mib: float = option(32.0, "Largest request body in MiB; larger ones are refused with 413.")
    read_timeout: float = option(30.0, "Seconds a client may take to send its headers, and again for the body.")
    write_timeout: float = option(60.0, "Seconds a client may read nothing while its answer waits; then it is cut off.")
    shutdown_timeout: float = option(30.0, "Seconds that running requests get to finish after SIGTERM or Ctrl+C.")
    log_format: str = option("text", "Format of log lines; json gives one object per line.", ("text", "json"))
    log_requests: bool = option(False, "Log prompts and sampling parameters. They are never logged otherwise.")
    otlp_traces_endpoint: str | None = option(
        None,
        "URL of an OpenTelemetry collector (OTLP over HTTP, such as http://localhost:4318/v1/traces): every request"
        " becomes a span there. Needs the extra moe-serve[otel]. Default: no tracing.",
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _require_positive(self, "max_body_mib", "read_timeout", "write_timeout")
        if self.shutdown_timeout < 0:
            raise ConfigError(f"--shutdown-timeout must not be negative, got {self.shutdown_timeout}")
