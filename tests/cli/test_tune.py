"""`moe-serve tune`: what it says where it cannot work. Measuring is tests/kernels/gpu/test_tuning.py's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_serve.cli import main


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "tune needs a GPU" in capsys.readouterr().err


def test_tokens_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--tokens", "4", "0"]) == 2
    assert "--tokens" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
