"""The doctor's arithmetic by hand, its measurements by their order of magnitude, its report on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.cli import main
from moe_serve.cli.doctor import command_line
from moe_serve.cli.flags import default_model
from moe_serve.config.units import MIB
from moe_serve.doctor import findings, rates
from moe_serve.doctor.fit import Sizes, fit, sizes_of
from moe_serve.doctor.rates import Rates
from moe_serve_base.safetensors_header import read_header

GB = 10**9
SIZES = Sizes(GB, GB // 10, num_layers=10, num_experts=8, top_k=2, kv_bytes_per_token=10_000, context=1000)
RATES = Rates(10 * GB, GB, None, None, 1e11, 1e11)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MEASURE_S", 0.02)


def test_with_room_for_everything_memory_is_the_bound() -> None:
    found = fit(SIZES, RATES, 100 * GB, is_cpu=True)
    assert (found.all_experts_fit, found.moe_cache_mib, found.cached_frac) == (True, None, 1.0)
    assert found.tokens_per_s == found.memory_bound_tokens_per_s == pytest.approx(10 / 3)  # 1 + 2 GB at 10 GB/s
    assert command_line("/m", found) == "moe-serve serve /m"


def test_without_it_the_disk_is() -> None:
    found = fit(SIZES, RATES, 5 * GB, is_cpu=True)  # 4 GB beside the dense weights, 2.8 of them for 8 GB of experts
    assert not found.all_experts_fit
    assert found.cached_frac == pytest.approx(0.35)
    assert found.moe_cache_mib == int(2.8 * GB) // MIB
    assert found.tokens_per_s == pytest.approx(1 / (0.65 * 2))
    words = command_line("/my model", found).split()
    assert words[2:4] == ["'/my", "model'"]
    assert words[words.index("--moe-cache-mib") + 1] == str(found.moe_cache_mib)


def test_on_a_gpu_what_is_missed_comes_over_the_link() -> None:
    measured = Rates(1000 * GB, GB, 20 * GB, 20 * GB, 1e13, 1e14)
    found = fit(SIZES, measured, 5 * GB, is_cpu=False)
    assert found.tokens_per_s == pytest.approx(20 / 1.3)
    assert fit(SIZES, measured, 100 * GB, is_cpu=False).moe_cache_mib == -(-8 * GB // MIB)


def test_dense_weights_that_do_not_fit_are_told() -> None:
    assert not fit(SIZES, RATES, GB // 2, is_cpu=True).dense_fits


def test_the_demo_model_has_the_sizes_of_its_files() -> None:
    sizes = sizes_of(default_model(), torch.bfloat16)
    assert (sizes.num_layers, sizes.num_experts, sizes.top_k, sizes.context) == (8, 8, 2, 2048)
    assert sizes.expert_bytes == 3 * 256 * 128 * 2
    assert sizes.kv_bytes_per_token == 2 * 8 * 4 * 32 * 2
    file = Path(default_model()) / "model.safetensors"
    _, header_bytes = read_header(file)
    assert sizes.dense_bytes + sizes.all_experts_bytes == file.stat().st_size - header_bytes
    there = torch.device("cuda")  # on a CPU our kernels would leave the weights in bf16
    assert sizes_of(default_model(), torch.float32, there).dense_bytes == 2 * sizes.dense_bytes


def test_measured_rates_are_of_this_world(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(20 * MIB))
    found = rates.measure([file], 1, torch.device("cpu"))
    assert 1e8 < found.memory_bytes_per_s < 1e12
    assert found.disk_bytes_per_s is not None
    assert 1e6 < found.disk_bytes_per_s < 1e12
    assert 1e8 < found.float32_flops < 1e14
    assert found.h2d_bytes_per_s is None


def test_missing_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.doctor.findings.library.load", lambda: None)
    monkeypatch.setattr("moe_serve.doctor.findings.shutil.which", lambda name: None)
    assert any("C++ compiler" in found.fix for found in findings.findings())


def test_low_limits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.doctor.findings.resource.getrlimit", lambda kind: (256, 1024))
    assert any("ulimit -n" in found.fix for found in findings.findings())


def test_the_report_ends_with_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("moe-serve serve")


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "moe-serve serve"
    assert found["sizes"]["num_experts"] == 8
    assert set(found) == {"hardware", "rates", "sizes", "fit", "findings", "known", "download_bytes", "command"}


def test_a_folder_without_a_model_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
