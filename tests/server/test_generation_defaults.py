"""generation_config.json, as vLLM reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import CheckpointError
from moe_serve.text.generation_defaults import eos_token_ids, read_generation_defaults

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"temperature": 0.6, "top_p": 0.9, "top_k": 40}, {"temperature": 0.6, "top_p": 0.9, "top_k": 40}),
    ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.0}),
    ({"do_sample": True}, {}),
    ({"top_p": None, "min_p": 0.1}, {"min_p": 0.1}),
    ({"max_new_tokens": 99}, {"max_tokens": 99}),
    ({"repetition_penalty": 1.1, "num_beams": 4, "pad_token_id": 0}, {"repetition_penalty": 1.1}),
]


@pytest.mark.parametrize(("content", "defaults"), CASES)
def test_fields_become_sampling_params(tmp_path: Path, content: dict[str, Any], defaults: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_generation_defaults(str(tmp_path)) == defaults
    assert read_generation_defaults(str(tmp_path), "vllm") == {}


def test_no_file_is_no_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(str(tmp_path)) == {}
    assert eos_token_ids(str(tmp_path)) == set()


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert eos_token_ids(str(tmp_path)) == {2, 3, 4}


@pytest.mark.parametrize(
    ("content", "words"),
    [({"do_sample": True, "top_p": 0.0}, "top_p must be"), ({"max_new_tokens": "5"}, "max_tokens takes")],
)
def test_a_default_that_no_request_can_have_names_the_file(content: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {words}"):
        read_generation_defaults(str(tmp_path))
    assert read_generation_defaults(str(tmp_path), "vllm") == {}


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}"])
def test_damaged_file_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_generation_defaults(str(tmp_path))
