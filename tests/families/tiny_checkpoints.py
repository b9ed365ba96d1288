"""Writing the tiny models as real checkpoint folders: random weights, a byte tokenizer, safetensors.

Knows transformers and safetensors; knows nothing of moe_serve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from .tiny_configs import TinyCase

END_OF_TEXT = "<|endoftext|>"
EXPERTS_OF_TABLES = 8
"""Of models that route by token id."""


def write_checkpoint(case: TinyCase, folder: Path, max_shard_size: str = "1GB") -> Path:
    """Save a random fp32 model and its tokenizer in `folder`; same case, same bytes."""
    model = random_model(case)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_model(case: TinyCase) -> Any:
    """A model whose every parameter is random, the ones that start at zero or one included."""
    torch.manual_seed(case.seed)
    config = case.config()
    model = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *_routing_buffers(model)]:
            _randomise(name, tensor, case.std, generator)
    return model.eval()


def auto_class(config: Any) -> Any:
    """What makes the model: composites, and some text models, are only known as models of images and text."""
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText


def _routing_buffers(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Correction biases and tables of routes are buffers in some families; left at zero they would test nothing."""
    return [(n, b) for n, b in model.named_buffers() if "correction_bias" in n or n.endswith("tid2eid")]


def _randomise(name: str, tensor: torch.Tensor, std: float, generator: torch.Generator) -> None:
    noise = torch.empty(tensor.shape).normal_(0.0, 1.0, generator=generator)
    if "correction_bias" in name:
        tensor.copy_(noise * 0.1)
    elif name.endswith("tid2eid"):
        tokens, choices = torch.meshgrid(*(torch.arange(n) for n in tensor.shape), indexing="ij")
        tensor.copy_((3 * tokens + choices) % EXPERTS_OF_TABLES)
    elif "norm" in name and name.endswith("weight"):
        tensor.copy_(1.0 + 0.2 * noise)
    elif name.endswith("sinks"):
        tensor.copy_(noise)
    else:
        tensor.copy_(std * noise)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, in the order of the byte values, then end-of-text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
