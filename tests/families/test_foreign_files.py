"""Files of other systems beside a good config.json: read, or refused with the true reason in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.hf.checkpoint import safetensors_files
from moe_serve.text.tokenizer import Tokenizer

Checkpoint = Callable[[str], Path]
CODE = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("consolidated.safetensors", "is in Mistral's own format"),
        ("consolidated.00.pth", "is in Mistral's own format"),
        ("pytorch_model-00001-of-00002.bin", "has weights as pytorch_model.bin only"),
        ("adapter_model.safetensors", "has the weights of an adapter only"),
        ("notes.txt", "no [*].safetensors file"),
    ],
)
def test_weights_of_another_format(file: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=words):
        safetensors_files(str(tmp_path))


def test_a_checkpoint_may_lie_beside_them(tmp_path: Path) -> None:
    for file in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / file).touch()
    assert safetensors_files(str(tmp_path)) == [tmp_path / "model.safetensors"]


PACKAGES = ("sentencepiece", "tiktoken")
"""Optional ones, which are not there in these tests."""


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["tekken.json"], "tekken.json: cannot be read as a tekken file"),
        (["tokenizer.model"], "sentencepiece, which is not installed"),
        (["tiktoken.model", "code"], "tiktoken, which is not installed"),
        (["qwen.tiktoken"], "does not say how a text is cut"),
        (["tokenizer.model", "code"], "auto_map in tokenizer_config.json"),
        ([], "no tokenizer here"),
    ],
)
def test_tokenizers_that_are_not_read(
    files: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in PACKAGES else found(name))
    for file in files:
        (tmp_path / file).touch()
    if "code" in files:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(CODE))
    with pytest.raises(ConfigError, match=words) as caught:
        Tokenizer.from_path(str(tmp_path))
    assert "\n" not in caught.value.message


def copied_tokenizer(source: Path, target: Path) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, target)
    return target


def test_a_whole_tokenizer_needs_no_code(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copied_tokenizer(checkpoint("mixtral"), tmp_path)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | CODE))
    (folder / "tokenizer.model").touch()
    assert Tokenizer.from_path(str(folder)).decode(Tokenizer.from_path(str(folder)).encode("one")) == "one"


def test_a_processors_chat_template_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copied_tokenizer(checkpoint("mixtral"), tmp_path)
    messages = [{"role": "user", "content": "one"}]
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer.from_path(str(folder))
    assert tokenizer.decode(tokenizer.render_chat(messages)) == "<one>"
    (folder / "chat_template.jinja").write_text("{{ 'other' }}")
    tokenizer = Tokenizer.from_path(str(folder))
    assert tokenizer.decode(tokenizer.render_chat(messages)) == "other"


@pytest.mark.parametrize("text", ["{", "[]", '{"chat_template": 3}', "{}"])
def test_a_wrong_chat_template_names_the_file(text: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copied_tokenizer(checkpoint("mixtral"), tmp_path)
    (folder / "chat_template.json").write_text(text)
    with pytest.raises(ConfigError, match=r"chat_template\.json"):
        Tokenizer.from_path(str(folder))
