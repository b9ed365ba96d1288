"""Experts in 12-bit codes through the whole engine: tokens and log-probabilities are those of the plain checkpoint.

Resident and from a cache smaller than the model; three families; and files that are damaged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_cache.storage import dense_codes, expert_file
from expert_cache.storage.expert_file import fingerprint
from expert_cache.storage.store import matrices_of
from moe_serve import LLM, SamplingParams
from moe_serve.cli import main
from moe_serve.doctor.fit import sizes_of
from moe_serve.errors import CheckpointError, MoEServeError
from moe_serve.hf.checkpoint import open_all_experts
from moe_serve.hf.dense import StoredLinear
from moe_serve_base.safetensors_header import read_header
from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.coded import CodedRows
from moe_serve_kernels.cpu.expert_mlp import MLPWeights, as_tensor

from .references import make_prompts
from .serving import SMALL_ENGINE, experts_of, runner_of
from .tiny_checkpoints import random_model, tiny_tokenizer
from .tiny_configs import CASES

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2")
WIDE = {"hidden_size": 256, "num_hidden_layers": 2}
"""Rows shorter than a group of codes stay as they are."""
SAMPLING = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
Packed = tuple[Path, Path]
"""A checkpoint, and the file of its experts in codes."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Packed]:
    """By family."""

    def write(family: str) -> Packed:
        folder = tmp_path_factory.mktemp(family)
        case = CASES[family]
        inner = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
        model = random_model(replace(case, std=0.05, fields=case.fields | WIDE | {inner: 128}))
        model.bfloat16().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        assert main(["pack", str(folder / "model"), str(folder / "codes"), "--lossless"]) == 0
        return folder / "model", folder / "codes"

    return cache(write)


def answers(folder: Path, **settings: Any) -> list[tuple[Any, Any]]:
    llm = LLM(str(folder), **{**SMALL_ENGINE, **settings})
    results = llm.generate(make_prompts()[:3], SAMPLING)
    experts_of(llm).check_integrity()
    return [(r.completions[0].token_ids, r.completions[0].logprobs) for r in results]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("mixtral", "float32"),
        *(pytest.param(f, d, marks=pytest.mark.slow) for f in FAMILIES for d in ("float32", "bfloat16")),
    ],
)
def test_tokens_and_logprobs_are_those_of_the_checkpoint(
    packed: Callable[[str], Packed], family: str, dtype: str
) -> None:
    folder, codes = packed(family)
    plain = answers(folder, dtype=dtype)
    assert answers(folder, dtype=dtype, moe_expert_file=str(codes)) == plain
    assert answers(folder, dtype=dtype, moe_expert_file=str(codes), moe_cache_mib=1, moe_cache_pool="global") == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_comes_back_from_three_quarters(packed: Callable[[str], Packed], family: str) -> None:
    folder, codes = packed(family)
    plain, store = open_all_experts(str(folder)), expert_file.read(codes)[0]
    for layer in plain.layers:
        for expert in range(plain.num_experts):
            pairs = zip(*(matrices_of(s.weights(layer, expert)) for s in (store, plain)), strict=True)
            for found, wanted in pairs:
                assert isinstance(found, CodedRows)
                assert torch.equal(as_tensor(found, torch.bfloat16), as_tensor(wanted, torch.bfloat16))
            (read,) = store.reads(layer, expert)
            assert read.num_bytes < 0.78 * 3 * 128 * 256 * 2
    assert store.total_bytes < 0.77 * plain.total_bytes
    assert 0 <= store.expert_bytes - store.total_bytes / store.num_total < 1


def test_the_doctor_counts_the_bytes_of_codes(
    packed: Callable[[str], Packed], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, codes = packed("mixtral")
    capsys.readouterr()
    assert main(["doctor", str(folder), "--moe-expert-file", str(codes), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sizes"]["expert_bytes"] == expert_file.read(codes)[0].expert_bytes
    assert f"--moe-expert-file {codes}" in told["command"]
    assert main(["doctor", str(folder), "--moe-expert-file", str(codes) + "x"]) == 2
    assert f"--moe-expert-file: there is no file {codes}x" in capsys.readouterr().err


def dense_layers(llm: LLM) -> dict[str, StoredLinear]:
    modules = runner_of(llm).model.named_modules()
    return {f"{name}.weight": layer for name, layer in modules if isinstance(layer, StoredLinear)}


@pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
@pytest.mark.parametrize("family", [n if n == "mixtral" else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_dense_layers_are_computed_from_codes(packed: Callable[[str], Packed], family: str) -> None:
    """Mapped from the file, or copied beside a cache; and the doctor counts what they take."""
    folder, codes = packed(family)
    plain = dense_layers(LLM(str(folder), **SMALL_ENGINE))
    for settings in ({}, {"moe_cache_mib": 1}):
        found = dense_layers(LLM(str(folder), **SMALL_ENGINE, moe_expert_file=str(codes), **settings))
        matrices = {name: layer.matrix for name, layer in found.items() if layer.matrix is not None}
        assert matrices.keys() == dense_codes.read(codes).keys()
        for name, matrix in matrices.items():
            assert torch.equal(as_tensor(matrix, torch.bfloat16), plain[name].weight)
    sizes = [sizes_of(str(folder), torch.float32, expert_file=file).dense_bytes for file in (None, str(codes))]
    stored = dense_codes.read(codes).values()
    assert sizes[0] - sizes[1] == sum(2 * rows.shape[0] * rows.shape[1] - rows.num_bytes for rows in stored) > 0


@pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
def test_damaged_dense_codes_are_found_at_the_start(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    folder, codes = packed("mixtral")
    name = "model.layers.1.self_attn.o_proj.weight"
    header, start = read_header(codes)
    contents = bytearray(codes.read_bytes())
    contents[start + header[f"dense.{name}"]["data_offsets"][0] + 7] ^= 1
    (tmp_path / "damaged").write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"damaged: {name}: the checksum is wrong; the file is damaged"):
        LLM(str(folder), **SMALL_ENGINE, moe_expert_file=str(tmp_path / "damaged"))


@pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
def test_slots_hold_codes_and_the_kernel_runs_on_them(packed: Callable[[str], Packed]) -> None:
    folder, codes = packed("mixtral")
    sizes: dict[str | None, int] = {}
    for file in (None, str(codes)):
        experts = experts_of(LLM(str(folder), **SMALL_ENGINE, moe_expert_file=file, moe_cache_mib=1))
        weights = experts.compute.prepare(experts.store.weights(experts.store.layers[0], 0))
        assert isinstance(weights, MLPWeights)
        assert isinstance(weights.gate, CodedRows) is (file is not None)
        assert experts.residency().num_slots == (1 << 20) // experts.store.slot_bytes
        sizes[file] = experts.store.slot_bytes
    assert sizes[str(codes)] < 0.78 * sizes[None]


def test_experts_that_are_not_bf16_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(checkpoint("mixtral")), str(tmp_path / "codes"), "--lossless"]) == 2
    assert "--lossless: the experts of this checkpoint are not bf16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def damaged(codes: Path, target: Path, tensor: str, byte: int, value: int) -> Path:
    """A copy with another byte, counted from the start of a tensor."""
    header, start = read_header(codes)
    contents = bytearray(codes.read_bytes())
    place = start + header[tensor]["data_offsets"][0] + byte
    assert contents[place] != value
    contents[place] = value
    target.write_bytes(contents)
    return target


def test_a_damaged_list_of_rare_weights_is_named_at_the_start(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    folder, codes = packed("mixtral")
    broken = damaged(codes, tmp_path / "broken", "layers.1.experts.2.down_rare", 3, 1)
    with pytest.raises(CheckpointError, match=r"broken: layer 1 expert 2, down: .* the file is damaged"):
        LLM(str(folder), **SMALL_ENGINE, moe_expert_file=str(broken))


def test_a_damaged_code_ends_the_request_that_needs_the_expert(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    folder, codes = packed("mixtral")
    header, start = read_header(codes)
    place = start + header["layers.0.experts.0.gate"]["data_offsets"][0]
    byte = codes.read_bytes()[place]
    broken = damaged(codes, tmp_path / "broken", "layers.0.experts.0.gate", 0, byte ^ 1)
    with pytest.raises(MoEServeError, match=r"layer 0 expert 0: the checksum does not match.*broken"):
        answers(folder, moe_expert_file=str(broken), moe_cache_mib=1, moe_cache_pool="global")


def test_a_header_that_lies_is_named(packed: Callable[[str], Packed], tmp_path: Path) -> None:
    folder, codes = packed("mixtral")
    contents = codes.read_bytes()
    wrong = contents.replace(b'"shape": "[128, 256]"', b'"shape": "[256, 128]"')
    assert wrong != contents
    (tmp_path / "broken").write_bytes(wrong)
    with pytest.raises(CheckpointError, match="broken: layer 0 expert 0, gate: gate is"):
        LLM(str(folder), **SMALL_ENGINE, moe_expert_file=str(tmp_path / "broken"))
    assert expert_file.read(codes)[1] == fingerprint(sorted(folder.glob("*.safetensors")))
