"""Write a random checkpoint of some family in a chosen size, for benchmarks that need bytes, not sense.

    python benchmarks/make_checkpoint.py mixtral-1.4g /tmp/mixtral-1.4g --dtype bfloat16

Shard by shard straight to safetensors, under the names published checkpoints use, so that
the peak of memory is one shard and no model is ever built. The tokenizer is the demo model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARD_BYTES = 200 << 20


@dataclass(frozen=True)
class Size:
    """What makes one checkpoint larger than another, of the family whose config is `kind`."""

    kind: type[PreTrainedConfig]
    hidden: int
    intermediate: int
    """Of one expert."""
    layers: int
    kv_heads: int
    experts: int = 8
    top_k: int = 2
    shared: int = 0
    """Intermediate size of the shared expert; of Qwen2-MoE."""
    head_dim: int = 64
    positions: int = 4096
    heads: int = 0
    """0: as many as make up the hidden size."""
    vocab: int = 4096

    def config(self, dtype: torch.dtype) -> PreTrainedConfig:
        make: Callable[..., PreTrainedConfig] = self.kind  # the base class does not name its families' fields
        return make(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads or self.hidden // self.head_dim,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions,
            num_experts_per_tok=self.top_k,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            dtype=str(dtype).removeprefix("torch."),
            architectures=[self.kind.__name__.removesuffix("Config") + "ForCausalLM"],
            **OWN_FIELDS[self.kind](self),
        )


def _mixtral(size: Size) -> dict[str, Any]:
    return {"intermediate_size": size.intermediate, "num_local_experts": size.experts}


def _qwen3(size: Size) -> dict[str, Any]:
    return {
        "intermediate_size": 4 * size.hidden,
        "moe_intermediate_size": size.intermediate,
        "num_experts": size.experts,
        "norm_topk_prob": True,
        **({"head_dim": size.head_dim} if size.heads else {}),
    }


def _gpt_oss(size: Size) -> dict[str, Any]:
    return {
        "intermediate_size": size.intermediate,
        "num_local_experts": size.experts,
        "head_dim": size.head_dim,
        "sliding_window": 128,
    }


def _qwen2(size: Size) -> dict[str, Any]:
    return {**_qwen3(size), "shared_expert_intermediate_size": size.shared}


def _deepseek(size: Size) -> dict[str, Any]:
    """As V2-Lite: latent attention, two shared experts, a dense first layer."""
    return {
        "intermediate_size": 8 * size.intermediate,
        "moe_intermediate_size": size.intermediate,
        "n_routed_experts": size.experts,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }


OWN_FIELDS: dict[type[PreTrainedConfig], Callable[[Size], dict[str, Any]]] = {
    MixtralConfig: _mixtral,
    Qwen2MoeConfig: _qwen2,
    Qwen3MoeConfig: _qwen3,
    DeepseekV2Config: _deepseek,
    GptOssConfig: _gpt_oss,
}
"""What one family's config has and others lack, or mean otherwise."""
SIZES = {
    "mixtral-20m": Size(MixtralConfig, 256, 640, layers=4, kv_heads=2),
    "mixtral-300m": Size(MixtralConfig, 768, 1536, layers=10, kv_heads=4),
    "mixtral-1.4g": Size(MixtralConfig, 1024, 3456, layers=8, kv_heads=4),
    "mixtral-4g": Size(MixtralConfig, 1024, 3584, layers=24, kv_heads=4),
    "mixtral-8x7b-4l": Size(MixtralConfig, 4096, 14336, layers=4, kv_heads=8),
    "mixtral-8x7b-2l": Size(MixtralConfig, 4096, 14336, 2, 8, head_dim=128, positions=32768, vocab=32000),
    "qwen3-30b-8l": Size(Qwen3MoeConfig, 2048, 768, 8, 4, 128, 8, 0, 128, 40960, heads=32, vocab=151936),
    "gpt-oss-20b-2l": Size(GptOssConfig, 2880, 2880, 2, 8, 32, 4, 0, 64, 131072, heads=64, vocab=201088),
    "qwen3-moe-30m": Size(Qwen3MoeConfig, 256, 128, layers=4, kv_heads=2, experts=64, top_k=4, positions=32768),
    "qwen3-moe-500m": Size(Qwen3MoeConfig, 512, 128, layers=10, kv_heads=2, experts=128, top_k=8),
    "qwen3-1b": Size(Qwen3MoeConfig, 1024, 256, layers=18, kv_heads=4, experts=64, top_k=8),
    "qwen2-1b": Size(Qwen2MoeConfig, 1024, 256, layers=18, kv_heads=4, experts=60, top_k=4, shared=1024),
    "deepseek-1b": Size(DeepseekV2Config, 1024, 256, layers=19, kv_heads=8, experts=64, top_k=6, head_dim=128),
}
"""mixtral-300m has 305 million parameters; the others are named for their bytes in bf16: mixtral-1.4g
1.42 GB and mixtral-4g 4.37 GB, both 96 % experts. One expert of mixtral-4g is 22 MB. mixtral-8x7b-4l has four layers
of the published Mixtral's shape, 11.6 GB in bf16, for a GPU; those that end in 2l and 8l have that many layers of the
published model and its vocabulary. qwen3-1b has 0.97 billion parameters, its experts 1.6 MB each; qwen2-1b is as large,
and its shared expert weighs as much as the four that a token chooses; deepseek-1b is half as wide as V2-Lite;
qwen3-moe-500m is 0.53 GB of experts of 0.4 MB."""


def tensor_shapes(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Checkpoint names and shapes, layer by layer."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config.num_hidden_layers):
        yield from _layer_shapes(f"model.layers.{layer}", config)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _layer_shapes(prefix: str, config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    if config.model_type == "deepseek_v2":
        yield from _latent_shapes(f"{prefix}.self_attn", config)
    else:
        yield from _attention_shapes(f"{prefix}.self_attn", config)
    yield f"{prefix}.input_layernorm.weight", (config.hidden_size,)
    yield f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,)
    if config.model_type == "mixtral":
        yield from _mixtral_shapes(f"{prefix}.block_sparse_moe", config)
    elif config.model_type == "gpt_oss":
        yield from _gpt_oss_shapes(f"{prefix}.mlp", config)
    elif config.model_type == "deepseek_v2" and prefix.endswith(".0"):
        yield from _mlp_shapes(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)
    else:
        yield from _fine_grained_shapes(f"{prefix}.mlp", config)


def _attention_shapes(prefix: str, config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, kind = config.hidden_size, config.num_attention_heads, config.model_type
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query, kv = heads * head_dim, config.num_key_value_heads * head_dim
    sizes = {"q_proj": (query, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, query)}
    for name, shape in sizes.items():
        yield f"{prefix}.{name}.weight", shape
        if kind == "gpt_oss" or (kind == "qwen2_moe" and name != "o_proj"):
            yield f"{prefix}.{name}.bias", shape[:1]
    for name in ("q_norm", "k_norm") if kind == "qwen3_moe" else ():
        yield f"{prefix}.{name}.weight", (head_dim,)
    if kind == "gpt_oss":
        yield f"{prefix}.sinks", (heads,)


def _latent_shapes(prefix: str, config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    plain, turned, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    yield f"{prefix}.q_proj.weight", (heads * (plain + turned), hidden)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (rank + turned, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (plain + value), rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * value)


def _mixtral_shapes(prefix: str, config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    yield f"{prefix}.gate.weight", (config.num_local_experts, hidden)
    for expert in range(config.num_local_experts):
        for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
            yield f"{prefix}.experts.{expert}.{name}.weight", shape


def _gpt_oss_shapes(prefix: str, config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All experts of a layer in one tensor, by input."""
    hidden, inner, num_experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    yield f"{prefix}.router.weight", (num_experts, hidden)
    yield f"{prefix}.router.bias", (num_experts,)
    yield f"{prefix}.experts.gate_up_proj", (num_experts, hidden, 2 * inner)
    yield f"{prefix}.experts.gate_up_proj_bias", (num_experts, 2 * inner)
    yield f"{prefix}.experts.down_proj", (num_experts, inner, hidden)
    yield f"{prefix}.experts.down_proj_bias", (num_experts, hidden)


def _fine_grained_shapes(prefix: str, config: PreTrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    num_experts = config.n_routed_experts if config.model_type == "deepseek_v2" else config.num_experts
    yield f"{prefix}.gate.weight", (num_experts, hidden)
    for expert in range(num_experts):
        yield from _mlp_shapes(f"{prefix}.experts.{expert}", hidden, inner)
    if config.model_type == "qwen2_moe":
        yield from _mlp_shapes(f"{prefix}.shared_expert", hidden, config.shared_expert_intermediate_size)
        yield f"{prefix}.shared_expert_gate.weight", (1, hidden)
    if config.model_type == "deepseek_v2":
        yield from _mlp_shapes(f"{prefix}.shared_experts", hidden, config.n_shared_experts * inner)


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (("gate_proj", (inner, hidden)), ("down_proj", (hidden, inner)), ("up_proj", (inner, hidden))):
        yield f"{prefix}.{name}.weight", shape


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Ones for norms; otherwise normal with variance 1 / fan-in, so that activations keep their size."""
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    std = 1.0 if "embed" in name else shape[-1] ** -0.5
    made = torch.empty(shape, device=generator.device).normal_(0.0, std, generator=generator)
    return made.to(dtype).cpu()


def write_weights(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, seed: int, device: str) -> int:
    """Write numbered shards and their index; returns the bytes of all tensors. `device` makes the numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    used = total = number = 0
    for name, shape in tensor_shapes(config):
        shard[name] = random_tensor(name, shape, dtype, generator)
        used += shard[name].nbytes
        if used >= SHARD_BYTES or name == "lm_head.weight":
            number += 1
            _write_shard(folder, number, shard, weight_map)
            total, used, shard = total + used, 0, {}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _write_shard(folder: Path, number: int, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    file = f"model-{number:05}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, file))


def make_checkpoint(
    size: str, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str = "cpu"
) -> Path:
    """Write the named size into `folder` unless the same one is there already; returns the folder.

    `device`: what makes the random numbers. A GPU makes other numbers than a CPU, and 10 GB in seconds.
    """
    done = folder / "made.json"
    recipe = {"size": size, "dtype": str(dtype), "seed": seed, "sizes": str(SIZES[size]), "device": device}
    if done.is_file() and json.loads(done.read_text()) == recipe:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = SIZES[size].config(dtype)
    write_weights(folder, config, dtype, seed, device)
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder / name)
    done.write_text(json.dumps(recipe))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = make_checkpoint(args.size, args.folder, getattr(torch, args.dtype), args.seed)
    files = list(folder.glob("*.safetensors"))
    print(f"{folder}: {len(files)} shards, {sum(f.stat().st_size for f in files) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
