"""EngineConfig: a model, the device that runs it, and the parts for memory, batching and queue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from moe_serve.config.experts import ExpertCacheConfig
from moe_serve.config.kv import HEADING as BATCHING
from moe_serve.config.kv import KVConfig
from moe_serve.config.queue import QueueConfig
from moe_serve.config.settings import Settings, changed_settings, option
from moe_serve.config.speculation import SpeculationConfig
from moe_serve.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig(Settings):
    """Everything the engine needs to know to load a model and run it."""

    HEADING: ClassVar[str] = "Model and device"

    model: str = option(
        "",
        "Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json), a GGUF file, or a model id"
        " of the Hugging Face Hub.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model id. Default: main.")
    offline: bool = option(False, "Take a model id from the local Hugging Face cache only, as HF_HUB_OFFLINE=1 does.")
    tokenizer: str | None = option(None, "Folder of the tokenizer. Default: the model's folder.", metavar="FOLDER")
    trust_remote_code: bool = option(
        False,
        "Run a tokenizer's own Python code, in a folder without a tokenizer file that is read. The model's own code"
        " never runs.",
    )
    dtype: str = option(
        "auto",
        "Type of weights and activations. auto: the checkpoint's type on a GPU, float32 on a CPU, where a request's"
        " tokens then do not depend on the other requests of its batch.",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option("auto", "Where the model runs: auto, cpu, cuda or cuda:N.")
    max_model_len: int | None = option(
        None, "Longest sequence, prompt plus completion, in tokens. Default: the model's own limit.", bound="positive"
    )
    num_threads: int | None = option(
        None, "CPU threads for the model. Default: the cores this process may use.", bound="threads"
    )
    enforce_eager: bool = option(
        False,
        "Run every operation of a decoding step separately: no captured CUDA graph on a GPU, no whole step in one"
        " kernel call on a CPU.",
    )
    seed: int = option(0, "Seed for requests that bring none of their own.")
    chat_template: str | None = option(
        None, "File with a Jinja chat template that replaces the tokenizer's.", metavar="FILE"
    )
    generation_config: str = option(
        "auto",
        "Default sampling parameters. auto: those of the checkpoint's generation_config.json. vllm: neutral ones.",
        ("auto", "vllm"),
    )
    max_num_seqs: int = option(128, "Most sequences in one step.", bound="positive", heading=BATCHING)
    max_num_batched_seqs: int | None = option(
        None,
        "Most sequences that decode in one step, if fewer than --max-num-seqs. The others keep their KV pages and wait"
        " for a later step. Default: all.",
        bound="positive",
        heading=BATCHING,
    )
    expert_aware_batching: str = option(
        "auto",
        "Which sequences decode when --max-num-batched-seqs leaves a choice. off: the oldest. on: those expected to"
        " share experts. auto: on while experts have to be read and a step leaves most of them unused.",
        ("off", "auto", "on"),
        heading=BATCHING,
    )
    max_skipped_steps: int = option(
        16,
        "Expert-aware batching passes a sequence over for at most this many steps in a row.",
        bound="positive",
        heading=BATCHING,
    )
    max_num_batched_tokens: int = option(
        2048, "Most tokens in one step; longer prompts are computed in chunks.", bound="positive", heading=BATCHING
    )
    enable_chunked_prefill: bool = option(
        True, "Compute long prompts in chunks, beside the decoding of others.", heading=BATCHING
    )
    kv: KVConfig = field(default_factory=KVConfig)
    experts: ExpertCacheConfig = field(default_factory=ExpertCacheConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    def check(self) -> None:
        if self.expert_aware_batching == "on" and self.max_num_batched_seqs is None:
            raise ConfigError("--expert-aware-batching on: there is nothing to choose without --max-num-batched-seqs")
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise ConfigError(f"--device: {self.device!r} is not auto, cpu, cuda or cuda:N")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < (self.max_model_len or 0):
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-model-len"
                f" ({self.max_model_len}) when chunked prefill is off"
            )

    def no_effect(self) -> str | None:
        given = changed_settings(self)
        for name in ("max_skipped_steps", "expert_aware_batching"):
            if name in given and self.max_num_batched_seqs is None:
                return f"{given[name].flag} has no effect without --max-num-batched-seqs"
        return self.kv.no_effect() or self.experts.no_effect() or self.speculation.no_effect()
