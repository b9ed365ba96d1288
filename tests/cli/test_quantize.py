"""`moe-serve quantize`: what it writes can be served, is close to the original, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moe_serve import LLM, SamplingParams
from moe_serve.cli import main
from moe_serve.cli.flags import default_model
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.hf.checkpoint import open_all_experts
from moe_serve.hf.dense import StoredLinear
from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from moe_serve_kernels.quantized import QuantizedRows
from predictors.shape import MoELayer

TEXT = "The old captain looked at the sea and said that it was a cold morning in November. " * 8
SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "max_model_len": 256, "num_kv_pages": 64}


def quantize(folder: Path, *flags: str, model: str = "") -> Path:
    assert main(["quantize", model or default_model(), "-o", str(folder), *flags]) == 0
    return folder


def errors(folder: Path) -> list[float]:
    """Relative error of each matrix of the first and last expert."""
    stores = open_all_experts(str(folder)), open_all_experts(default_model())
    found = []
    for layer, expert in ((MoELayer(0), 0), (MoELayer(7), 7)):
        ours, original = (store.weights(layer, expert) for store in stores)
        for part in ("gate", "up", "down"):
            a, b = as_tensor(getattr(ours, part), torch.float32), as_tensor(getattr(original, part), torch.float32)
            found.append(float((a - b).norm() / b.norm()))
    return found


def continuation(folder: str) -> list[int]:
    llm = LLM(folder, **SETTINGS)
    return (
        llm.generate([TEXT], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))[0].completions[0].token_ids
    )


@pytest.mark.parametrize(("bits", "most"), [("8", 0.012), ("4", 0.13)])
def test_it_is_close_to_the_original_and_small(tmp_path: Path, bits: str, most: float) -> None:
    folder = quantize(tmp_path / "out", "--bits", bits)
    assert max(errors(folder)) < most
    stores = open_all_experts(str(folder)), open_all_experts(default_model())
    assert stores[0].expert_bytes < stores[1].expert_bytes * int(bits) / 16 * 1.05
    if bits == "8":
        assert continuation(str(folder)) == continuation(default_model())


def test_calibration_changes_scales_but_not_the_format(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT * 4)
    plain = quantize(tmp_path / "plain")
    searched = quantize(tmp_path / "searched", "--calibration", str(tmp_path / "text"), "--calibration-tokens", "600")
    a, b = load_file(plain / "model.safetensors"), load_file(searched / "model.safetensors")
    assert a.keys() == b.keys()
    assert any(not torch.equal(a[name], b[name]) for name in a if name.endswith("weight_scale"))
    assert (plain / "config.json").read_text() == (searched / "config.json").read_text()
    assert len(continuation(str(searched))) == 6


def test_what_is_no_expert_stays_as_it_was(tmp_path: Path) -> None:
    folder = quantize(tmp_path / "out")
    written = load_file(folder / "model.safetensors")
    with safe_open(Path(default_model()) / "model.safetensors", "pt") as original:
        for name in original.keys():  # noqa: SIM118 - safe_open is not a dict
            if ".experts." not in name:
                assert torch.equal(written[name], original.get_tensor(name))
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in fields["ignore"]
    assert not any(".experts." in name for name in fields["ignore"])
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "48"], "--group-size 48 does not divide the 256 columns"),
        (["--group-size", "12"], "multiple of 8"),
        (["--calibration", "/nowhere"], "--calibration: /nowhere cannot be read"),
    ],
)
def test_what_it_cannot_do_is_said_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["quantize", default_model(), "-o", str(tmp_path / "out"), *flags]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_and_a_quantised_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quantize(tmp_path / "out", "--bits", "8")
    assert main(["quantize", default_model(), "-o", str(folder)]) != 0
    assert main(["quantize", str(folder), "-o", str(tmp_path / "again")]) != 0
    err = capsys.readouterr().err
    assert "exists" in err
    assert "is quantised already" in err


@pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
@pytest.mark.parametrize(("dense", "most"), [("int8", 0.012), ("int4", 0.13)])
def test_dense_weights_are_quantised_where_that_is_asked_for(tmp_path: Path, dense: str, most: float) -> None:
    """With other bits than the experts' where --dense says so; embeddings, routers and norms stay."""
    folder = quantize(tmp_path / "out", "--dense", dense)
    written, original = (load_file(Path(f) / "model.safetensors") for f in (folder, default_model()))
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert all(name.endswith(".gate") for name in fields["ignore"])
    assert torch.equal(written["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    runner = LLM(str(folder), **SETTINGS).engine.runner
    assert isinstance(runner, ModelRunner)
    layers = runner.model.named_modules()
    coded = {n: m.matrix for n, m in layers if isinstance(m, StoredLinear) and isinstance(m.matrix, QuantizedRows)}
    assert len(coded) == 4 * 8
    for name, matrix in coded.items():
        wanted = original[f"{name}.weight"].float()
        assert float((as_tensor(matrix, torch.float32) - wanted).norm() / wanted.norm()) < most
        assert matrix.kind == ("uint8" if dense == "int8" else "int4")
    assert max(errors(folder)) < 0.13
    assert len(continuation(str(folder))) == 6
