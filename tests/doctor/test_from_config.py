"""Sizes from config.json alone, against what the published checkpoints' indices say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.cli import main
from moe_serve.doctor import rates
from moe_serve.doctor.fit import sizes_of
from moe_serve.doctor.from_config import further_bytes, sizes_from_config
from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "checkpoints/published.json").read_text())
"""Fields of config.json, and metadata.total_size of model.safetensors.index.json."""
QUICK = {"mistralai/Mixtral-8x7B-v0.1", "openai/gpt-oss-20b"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PUBLISHED]
)
def test_a_published_checkpoint_is_within_half_a_percent(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    sizes = sizes_from_config(str(tmp_path), torch.bfloat16)
    total = sizes.dense_bytes + sizes.all_experts_bytes + further_bytes(str(tmp_path), sizes)
    assert total == pytest.approx(PUBLISHED[name]["total_size"], rel=0.005)


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "qwen3_next"])
def test_the_config_says_what_the_files_say(case: str, tmp_path: Path) -> None:
    folder = write_checkpoint(CASES[case], tmp_path)
    there = torch.device("meta")  # on a CPU our kernels would leave the weights in bf16
    files, alone = sizes_of(str(folder), torch.float32, there), sizes_from_config(str(folder), torch.float32)
    assert alone.dense_bytes == pytest.approx(files.dense_bytes, rel=0.01)
    for name in ("expert_bytes", "num_layers", "num_experts", "top_k", "kv_bytes_per_token", "context"):
        assert getattr(alone, name) == getattr(files, name)
    assert alone.state_bytes_per_sequence == files.state_bytes_per_sequence


def test_a_config_alone_gets_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rates, "MEASURE_S", 0.02)
    monkeypatch.setattr(rates, "SCRATCH_BYTES", rates.CHUNK_BYTES)
    published = PUBLISHED["mistralai/Mixtral-8x7B-v0.1"]
    (tmp_path / "config.json").write_text(json.dumps(published["config"]))
    index = {"metadata": {"total_size": published["total_size"]}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for model in (tmp_path, tmp_path / "config.json"):
        main(["doctor", str(model)])
        shown = capsys.readouterr().out
        assert "from config.json alone; the index says 93.41 GB in all" in shown
        assert "90.19 GB: 32 x 8 of 0.35 GB, 2 per token" in shown
        assert "moe-serve serve MODEL --moe-cache-mib" in shown
