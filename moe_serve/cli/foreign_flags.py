"""Flags that people know from vLLM and llama.cpp, and what they are called here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_EXPERTS = "--moe-cache-mib limits the memory for experts, --kv-cache-mib that for KV pages"
_DEVICES = "--devices N divides the experts among N devices"
_SERVE_CONFIG = "only `moe-serve serve` reads a file of settings"
_CHECKPOINT = "the checkpoint's config.json says how it is quantised; `moe-serve quantize` makes such a checkpoint"
_TLS = "put a reverse proxy in front for TLS (docs/operation.md)"
_TOOLS = "tools need no flag: `tools` and `tool_choice` in a request are enough"
_DOWNLOAD = "nothing is downloaded; run `hf download org/name`, then give org/name as MODEL"
_CODE = "this command runs no code of a checkpoint; serve, generate and chat have the flag, for tokenizers"

HINTS: Mapping[str, str] = MappingProxyType(
    {
        "--model": "MODEL is given without a flag: moe-serve serve MODEL",
        "--config": _SERVE_CONFIG,
        "--gpu-memory-utilization": _EXPERTS,
        "--kv-cache-memory-bytes": "--kv-cache-mib gives the memory for KV pages in MiB",
        "--cpu-offload-gb": _EXPERTS,
        "--swap-space": _EXPERTS,
        "--cpu-moe": _EXPERTS,
        "--n-cpu-moe": _EXPERTS,
        "--tensor-parallel-size": _DEVICES,
        "--pipeline-parallel-size": _DEVICES,
        "--data-parallel-size": _DEVICES,
        "--enable-expert-parallel": _DEVICES,
        "--tp": _DEVICES,
        "-tp": _DEVICES,
        "--quantization": _CHECKPOINT,
        "--load-format": _CHECKPOINT,
        "--trust-remote-code": _CODE,
        "--download-dir": _DOWNLOAD,
        "--revision": _DOWNLOAD,
        "--hf-token": _DOWNLOAD,
        "--enable-auto-tool-choice": _TOOLS,
        "--speculative-config": "give --speculative-method ngram, --num-speculative-tokens and --prompt-lookup-max",
        "--ssl-keyfile": _TLS,
        "--ssl-certfile": _TLS,
        "--enable-log-requests": "--log-requests logs prompts and sampling parameters",
        "--disable-log-requests": "requests are not logged unless you give --log-requests",
        "--max-tokens": "serve takes max_tokens in a request; --max-model-len limits the whole sequence",
        "--ctx-size": "--max-model-len N sets the context length",
        "-c": "--max-model-len N sets the context length",
        "--n-gpu-layers": "--device cuda puts the model on the GPU, --moe-cache-mib limits the experts there",
        "-ngl": "--device cuda puts the model on the GPU, --moe-cache-mib limits the experts there",
        "--n-predict": "--max-tokens N sets the longest answer",
        "-n": "--max-tokens N sets the longest answer",
        "--threads": "--num-threads N sets the CPU threads",
        "-t": "--num-threads N sets the CPU threads",
        "--parallel": "--max-num-seqs N sets the sequences in one step",
        "-np": "--max-num-seqs N sets the sequences in one step",
        "--host": "--base-url URL gives the server's address",
        "--port": "--base-url URL gives the server's address",
        "--endpoint-type": "--backend says which API to call",
        "--tokenizer": "prompts are spelt with the server's own /tokenize; leave it out",
        "-m": "MODEL is given without a flag: moe-serve serve MODEL",
        "-p": "--prompt TEXT gives the prompt",
    }
)
"""Foreign flag -> what to do instead."""
