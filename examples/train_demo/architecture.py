"""The shipped architecture: its configuration, a fresh model, and how it is written to disk."""

import shutil
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)

from examples.train_demo.tokenizer import END_OF_TEXT, IM_END, save_tokenizer


def model_config(tokenizer: PreTrainedTokenizerBase, balance: float) -> MixtralConfig:
    """The architecture that is shipped; ``balance`` is recorded for whoever trains it on."""
    ids = tokenizer.get_vocab()
    return MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=ids[END_OF_TEXT],
        eos_token_id=ids[IM_END],
        pad_token_id=ids[END_OF_TEXT],
        router_aux_loss_coef=balance,
    )


def build_model(config: MixtralConfig, seed: int) -> MixtralForCausalLM:
    """A fresh model whose blocks start as the identity (their output weights are zero)."""
    torch.manual_seed(seed)
    model: MixtralForCausalLM = MixtralForCausalLM(config).train()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                param.zero_()
    return model


def generation_config(config: MixtralConfig) -> GenerationConfig:
    """Sampling defaults; both the chat and the document end stop a generation."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.bos_token_id],
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_length=config.max_position_embeddings,
    )


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the folder in bf16, each file moved into place whole."""
    staging = out.parent / f".{out.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    copy = MixtralForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = generation_config(model.config)
    copy.bfloat16()
    copy.save_pretrained(staging)
    save_tokenizer(tokenizer, staging)
    out.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        path.chmod(0o644)
        path.replace(out / path.name)
    staging.rmdir()
