"""Which of a repository's files a checkpoint needs: weights in one format, configs, tokenizer and chat templates.

Looks at names only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

from moe_serve.errors import ConfigError
from moe_serve.gguf_files.paths import PART, PROJECTOR, SUFFIX

SMALL = (".json", ".jinja", "merges.txt", "vocab.txt", ".model", ".tiktoken")
"""Ends of the names of what is not weights."""
TOKENIZER_CODE = "tokenization_*.py"
"""Runs with --trust-remote-code only."""
TEMPLATES = "additional_chat_templates/"
OTHER_RECIPE = "-ud-"
"""Before the type in the names of files in which layers differ in type by Unsloth's choice."""
BESIDE = ("consolidated", "adapter_")
"""Weights of other layouts, which some repositories hold beside the checkpoint."""


def wanted_files(model_id: str, names: Iterable[str], variant: str | None) -> list[str]:
    """The files to download. ConfigError where `variant`, such as Q4_K_M, must be given and is not, or fits no file."""
    names = sorted(names)
    safetensors = [name for name in names if _is_top(name) and name.endswith(".safetensors")]
    safetensors = [name for name in safetensors if not name.startswith(BESIDE)]
    if safetensors and variant is None:
        return safetensors + [name for name in names if _is_small(name)]
    gguf = [name for name in names if name.endswith(SUFFIX) and not name.split("/")[-1].startswith(PROJECTOR)]
    if not gguf:
        raise ConfigError(f"{model_id} holds neither *.safetensors nor *.gguf files that moe-serve reads")
    return _one_variant(model_id, gguf, variant)


def _is_top(name: str) -> bool:
    return "/" not in name


def _is_small(name: str) -> bool:
    named = name.endswith(SMALL) or fnmatch(name, TOKENIZER_CODE)
    return named and (_is_top(name) or name.startswith(TEMPLATES))


def _one_variant(model_id: str, gguf: Sequence[str], variant: str | None) -> list[str]:
    """The parts of the one model whose name has `variant` in it."""
    models: dict[str, list[str]] = {}
    for name in gguf:
        match = PART.match(name)
        models.setdefault(match["stem"] if match else name.removesuffix(SUFFIX), []).append(name)
    found = [stem for stem in models if variant is None or _has(stem, variant)]
    if len(found) != 1:
        listed = ", ".join(stem.split("/")[-1] for stem in (found or models))
        asked = f"{model_id}:{variant} fits {len(found)}" if variant else f"{model_id} holds {len(found)}"
        raise ConfigError(f"{asked} GGUF models; name one, such as {model_id}:Q4_K_M, of: {listed}")
    return models[found[0]]


def _has(stem: str, variant: str) -> bool:
    """Whether a name ends in the variant: Q4_K fits no Q4_K_M, and Q4_K_M no UD-Q4_K_M."""
    name, variant = stem.split("/")[-1].lower(), variant.lower()
    before = name.removesuffix(variant)
    return before != name and (not before or before[-1] in "-.") and not before.endswith(OTHER_RECIPE)
