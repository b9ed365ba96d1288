"""Checkpoints with other towers: the text model's answers, and a log that says what is left out.

Each is a tiny text checkpoint in the form in which its family's composites lie: its config under `text_config`, its
tensors under the composite's prefix, and beside them tensors of a vision tower.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_serve.errors import CheckpointError
from moe_serve.text.generation_defaults import eos_token_ids

from .references import Reference
from .relayout import Tensors, copy_with
from .serving import greedy, load, tokens

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]
COMPOSITES = {
    "gemma4": ("gemma4", "model.language_model."),
    "kimi_k25": ("deepseek_v3", "language_model."),
    "llama4": ("llama4", "language_model."),
    "mistral3": ("mistral4", "language_model."),
    "qwen3_5_moe": ("qwen3_5_moe", "model.language_model."),
    "qwen3_omni_moe": ("qwen3_moe", "thinker."),
}
"""model_type -> the case of its text model, and the prefix of its tensors."""
SPEECH = {"talker.model.layers.0.mlp.experts.0.up_proj.weight": (8, 8), "code2wav.decoder.0.conv.weight": (8, 8)}
"""Of Qwen3-Omni: experts with the text model's numbers."""
TOWER = {"model.visual.blocks.0.attn.proj.weight": (8, 8), "model.visual.patch_embed.proj.weight": (8, 3)}


def composite(model_type: str, text: Path, folder: Path, outside: Tensors | None = None) -> Path:
    """`outside`: tensors beside the text model's and the tower's."""
    prefix = COMPOSITES[model_type][1]

    def wrapped(tensors: Tensors) -> Tensors:
        beside = TOWER | (SPEECH if model_type == "qwen3_omni_moe" else {})
        tower = {name: torch.ones(shape) for name, shape in beside.items()}
        return {_inside(prefix, name): tensor for name, tensor in tensors.items()} | tower | (outside or {})

    copy_with(text, folder, wrapped)
    inner = json.loads((folder / "config.json").read_text())
    outer = {"model_type": model_type, "text_config": inner, "dtype": inner.pop("dtype"), "tie_word_embeddings": False}
    if model_type == "qwen3_omni_moe":
        inner["model_type"] = "qwen3_omni_moe_text"
        outer["thinker_config"] = {"model_type": "qwen3_omni_moe_thinker", "text_config": outer.pop("text_config")}
    (folder / "config.json").write_text(json.dumps(outer))
    return folder


def _inside(prefix: str, name: str) -> str:
    if prefix in ("language_model.", "thinker."):  # around the whole text model
        return prefix + name
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_the_text_model_answers_as_it_does_alone(
    model_type: str,
    checkpoint: Checkpoint,
    reference: References,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = COMPOSITES[model_type][0]
    ref, folder = reference(case), composite(model_type, checkpoint(case), tmp_path)
    with caplog.at_level(logging.INFO, "moe_serve"):
        llm = load(folder)
    (said,) = re.findall(r"only the text model is served; not read: (.*)", caplog.text)
    speech = {"talker (1 tensors)", "code2wav (1 tensors)"} if model_type == "qwen3_omni_moe" else set()
    assert set(said.split(", ")) == {"visual (2 tensors)"} | speech
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs


def test_a_tensor_of_neither_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    stray = {"model.language_model.layers.0.self_attn.gate.weight": torch.ones(2, 2)}
    folder = composite("gemma4", checkpoint("gemma4"), tmp_path, stray)
    with pytest.raises(CheckpointError, match=r"self_attn\.gate\.weight"):
        load(folder)


def test_end_tokens_of_the_text_config_count(tmp_path: Path) -> None:
    fields = {"eos_token_id": 1, "text_config": {"eos_token_id": [2, 3]}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert eos_token_ids(str(tmp_path)) == {1, 2, 3}
