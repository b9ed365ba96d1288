"""`moe-serve pack`: the file it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expert_cache.storage import expert_file
from expert_cache.storage.direct_io import BLOCK_BYTES
from moe_serve.cli import main
from moe_serve.cli.flags import default_model
from moe_serve.hf.checkpoint import open_all_experts


def test_every_expert_is_one_aligned_run_with_its_checksum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experts"
    assert main(["pack", default_model(), str(path)]) == 0
    assert f"--moe-expert-file {path}" in capsys.readouterr().out
    original, packed = open_all_experts(default_model()), expert_file.read(path)[0]
    assert packed.decoder_layers == original.decoder_layers
    for layer in packed.layers:
        for expert in range(packed.num_experts):
            (read,) = packed.reads(layer, expert)
            assert packed.checksum(layer, expert)
            assert read.offset % BLOCK_BYTES == 0
            a, b = packed.weights(layer, expert), original.weights(layer, expert)
            for part, expected in zip((a.gate, a.up, a.down), (b.gate, b.up, b.down), strict=True):
                assert isinstance(part, torch.Tensor)
                assert isinstance(expected, torch.Tensor)
                assert torch.equal(part, expected)


def test_an_existing_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experts"
    path.write_text("precious")
    assert main(["pack", default_model(), str(path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", default_model(), str(tmp_path / "no" / "experts")]) == 2
    assert f"its folder does not exist; create {tmp_path / 'no'} first" in capsys.readouterr().err


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path) -> None:
    store = open_all_experts(default_model())
    done = 0

    def interrupt() -> None:
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        expert_file.write(store, tmp_path / "experts", "source", interrupt)
    assert list(tmp_path.iterdir()) == []
