"""A GGUF file's tokenizer as tokenizer.json, by transformers' own conversion.

A byte-level vocabulary is cut by a pattern that the file only names. transformers takes GPT-2's pattern for a name
that it does not know, which gives other tokens without a word: such a name is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from moe_serve.errors import CheckpointError

GPT2_NAMES = {"gpt-2", "gpt2", "olmo", "refact", "granite", "default"}
"""Whose pattern is GPT-2's, or llama.cpp's stand-in for it."""
LLAMA3 = GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
MORE_SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": DEEPSEEK3,
    "hunyuan-dense": DEEPSEEK3,
    "joyai-llm": DEEPSEEK3,
    "chatglm-bpe": (LLAMA3,),
    "glm4": (LLAMA3,),
}
"""By name, what is cut out in turn (llama.cpp, `llm_tokenizer_bpe`)."""
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_tokenizer(file: Path, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, with the chat template, into `folder`. CheckpointError."""
    try:
        architecture, vocabulary, config = get_gguf_tokenizer(str(file))
        backend, _ = convert_gguf_tokenizer(architecture, vocabulary)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise CheckpointError(f"{file}: the tokenizer cannot be read ({error}); give --tokenizer FOLDER") from error
    if vocabulary.get("tokenizer_type") == "gpt2":
        _split_as_named(backend, str(vocabulary.get("pre_tokenizer_type", "default")), file)
    special = {name: config[name] for name in TOKENS if config.get(name) is not None}
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=config.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )
    if config.get("add_bos_token"):
        _begin_with_bos(tokenizer)
    tokenizer.save_pretrained(folder)


def _split_as_named(backend: Tokenizer, name: str, file: Path) -> None:
    if name in MORE_SPLITS:
        cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in MORE_SPLITS[name]]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    elif name not in GPT2_NAMES and name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.pre is {name!r}, a way to cut text that moe-serve does not know; give"
            " --tokenizer FOLDER with the tokenizer.json of the model's checkpoint"
        )


def _begin_with_bos(tokenizer: Any) -> None:
    from tokenizers import processors

    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    if number is None:
        return
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
