"""A quantisation config that says other than the tensors: the tensors decide, or an error names field and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_cache.storage.store import ExpertStore
from moe_serve.cli import main
from moe_serve.errors import CheckpointError
from moe_serve.hf.checkpoint import checkpoint_fingerprint, dense_tensors, open_all_experts, open_expert_file
from moe_serve.hf.config_file import read_config, scheme_in
from moe_serve.hf.family import family_of
from moe_serve.hf.quantized_dense import dense_state
from moe_serve.spec import ModelSpec
from moe_serve_kernels.cpu.expert_mlp import as_tensor

from .quantized_checkpoints import FORMATS, Format, write_pair
from .references import compute_reference
from .relayout import WEIGHTS, Tensors
from .serving import greedy, load, tokens

EXPERT = "experts.3.w2"
DENSE = pytest.param("self_attn.q_proj", marks=pytest.mark.slow)
"""Two ways through the code, the same promises."""
Checkpoint = Callable[[str], Path]
Change = Callable[[Tensors], Tensors]


def again(form: str, note: dict[str, Any]) -> Any:
    """A case that runs as another does."""
    return pytest.param(form, note, marks=pytest.mark.slow)


def same(tensors: Tensors) -> Tensors:
    return tensors


def without(end: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def changed(folder: Path, note: dict[str, Any], change: Change = same) -> Path:
    """The checkpoint in place, with fields of its quantization_config, or of a group's weights there, and tensors."""
    config = json.loads((folder / "config.json").read_text())
    fields = config["quantization_config"]
    groups = fields.get("config_groups")
    (groups["group_0"]["weights"] if groups else fields).update(note)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def dense(folder: Path) -> Tensors:
    config = read_config(str(folder))
    scheme, found = scheme_in(str(folder), config), dense_tensors(str(folder), family_of(config), None)
    if scheme is None:
        return {stored.name: stored.tensor for stored in found}
    return dense_state(dense_tensors(str(folder), family_of(config), scheme), scheme, torch.float32)


def assert_experts_equal(ours: ExpertStore, twin: ExpertStore) -> None:
    for layer in twin.layers:
        for expert in range(twin.num_experts):
            for part in ("gate", "up", "down"):
                got, wanted = (as_tensor(getattr(s.weights(layer, expert), part), torch.float32) for s in (ours, twin))
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def assert_like(folder: Path, twin: Path) -> None:
    assert_experts_equal(*(open_all_experts(str(each)) for each in (folder, twin)))
    ours, theirs = dense(folder), dense(twin)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("form", "note"),
    [
        ("gptq-zeros", {"sym": True}),
        again("gptq-v2-zeros", {"sym": True}),
        again("gptq", {"sym": False}),
        again("gptq", {"checkpoint_format": "gptq_v2"}),
        again("gptq", {"desc_act": True}),
        ("gptq-ordered", {"desc_act": False}),
        ("awq", {"zero_point": False}),
        ("ct-int4-zeros", {"symmetric": True}),
        again("ct-int4-ordered", {"actorder": None}),
    ],
)
def test_the_tensors_decide(form: str, note: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path) -> None:
    coded, twin = write_pair(checkpoint("mixtral"), tmp_path, FORMATS[form])
    assert_like(changed(coded, note), twin)


def test_a_model_answers_by_its_tensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    coded, twin = write_pair(checkpoint("mixtral"), tmp_path, FORMATS["gptq-ordered"])
    reference = compute_reference(twin)
    assert tokens(greedy(load(changed(coded, {"desc_act": False})), reference.prompts)) == reference.outputs


@pytest.mark.parametrize("other", ["gptq-ordered", "gptq-zeros"])
def test_one_expert_may_differ_from_all_others(other: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As a calibration leaves it that never saw the expert; an expert file has one layout for all."""

    def form_of(name: str) -> Format:
        return FORMATS[other if "experts.1." in name else "gptq"]

    coded, twin = write_pair(checkpoint("mixtral"), tmp_path, FORMATS["gptq"], form_of)
    assert_like(coded, twin)
    packed = tmp_path / "experts.bin"
    assert main(["pack", str(coded), str(packed)]) == 0
    assert checkpoint_fingerprint(str(coded))
    store = open_all_experts(str(twin))
    spec = ModelSpec.from_hf(read_config(str(coded)))
    assert_experts_equal(open_expert_file(str(packed), str(coded), list(store.decoder_layers), spec), store)


@pytest.mark.parametrize(
    ("form", "end", "field"),
    [
        ("gptq-zeros", ".qzeros", "quantization_config.sym is False"),
        ("gptq-ordered", ".g_idx", "quantization_config.desc_act is True"),
        ("awq", ".qzeros", "quantization_config.zero_point is True"),
        ("ct-int4-zeros", ".weight_zero_point", "weights.symmetric is False"),
        ("ct-int4-ordered", ".weight_g_idx", "weights.actorder is 'group'"),
    ],
)
@pytest.mark.parametrize("where", [EXPERT, DENSE])
def test_a_tensor_that_the_config_promises(
    form: str, end: str, field: str, where: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    coded, _ = write_pair(checkpoint("mixtral"), tmp_path, FORMATS[form])
    changed(coded, {}, without(where + end))
    with pytest.raises(CheckpointError, match=rf"{where}.*{field}, but the files hold no {end[1:]}"):
        assert_like(coded, coded)


@pytest.mark.parametrize("value", [0, 1])
def test_zero_points_of_a_symmetric_format(value: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    coded, twin = write_pair(checkpoint("mixtral"), tmp_path, FORMATS["ct-int8"])

    def zero_points(tensors: Tensors) -> Tensors:
        scales = [name for name in tensors if name.endswith("weight_scale")]
        zeros = {name: torch.zeros_like(tensors[name], dtype=torch.int8) for name in scales}
        zeros[scales[-1]][-1] = value
        return tensors | {name.replace("weight_scale", "weight_zero_point"): zeros[name] for name in scales}

    changed(coded, {}, zero_points)
    if not value:
        return assert_like(coded, twin)
    with pytest.raises(CheckpointError, match=r"weight_zero_point holds zero points, but .*symmetric is True"):
        open_all_experts(str(coded))


def as_type(end: str, dtype: torch.dtype) -> Change:
    return lambda tensors: {n: t.to(dtype) if n.endswith(end) else t for n, t in tensors.items()}


@pytest.mark.parametrize("where", [EXPERT, DENSE])
@pytest.mark.parametrize(
    ("form", "dtype", "wanted"),
    [("fp8-blocks", torch.float8_e5m2, "fp8"), ("ct-int8", torch.float8_e4m3fn, "int8"), ("ct-fp8", torch.int8, "fp8")],
)
def test_codes_of_another_type(
    form: str, dtype: torch.dtype, wanted: str, where: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    coded, _ = write_pair(checkpoint("mixtral"), tmp_path, FORMATS[form])
    changed(coded, {}, as_type(f"{where}.weight", dtype))
    message = rf"{where}.weight is stored as {str(dtype)[6:]}, but config.json asks for {wanted}"
    with pytest.raises(CheckpointError, match=message):
        assert_like(coded, coded)


@pytest.mark.parametrize("where", [EXPERT, DENSE, ""])
def test_codes_without_scales(where: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """fp8 is a floating-point type, and its codes would pass for weights."""
    coded, _ = write_pair(checkpoint("mixtral"), tmp_path, FORMATS["fp8-blocks"])
    changed(coded, {}, without(where + ".weight_scale_inv"))
    with pytest.raises(CheckpointError, match="no scales"):
        assert_like(coded, coded)


@pytest.mark.parametrize("where", [EXPERT, DENSE])
def test_a_group_that_is_not_there(where: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    coded, _ = write_pair(checkpoint("mixtral"), tmp_path, FORMATS["gptq-ordered"])

    def beyond(tensors: Tensors) -> Tensors:
        return {n: t + 1 if n.endswith(f"{where}.g_idx") else t for n, t in tensors.items()}

    changed(coded, {}, beyond)
    with pytest.raises(CheckpointError, match=rf"{where}.g_idx names a group beyond"):
        assert_like(coded, coded)
