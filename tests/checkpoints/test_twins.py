"""Twins of published checkpoints: served with the tokens of the float twin, or refused with a reason.

The float twin's tokens are those of transformers' `generate`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import UnsupportedModelError
from moe_serve.hf.config_file import read_config
from moe_serve.hf.families import family_in
from moe_serve.text.generation_defaults import eos_token_ids
from moe_serve.text.tokenizer import Tokenizer
from tests.families.quantized_checkpoints import FORMATS, Format, modelopt_fp8, write_pair
from tests.families.references import compute_reference
from tests.families.serving import greedy, load, tokens
from tests.families.tiny_checkpoints import tiny_tokenizer, write_checkpoint
from tests.families.tiny_configs import CASES

from .publishing import edit, publish
from .rows import MORE, ROWS
from .twin import Row

FAST = {"deepseek-ai/DeepSeek-R1", "moonshotai/Kimi-K2.5"}
SERVED = [
    pytest.param(row, id=row.name, marks=[] if row.name in FAST else pytest.mark.slow)
    for row in (*ROWS, *MORE)
    if row.twin
]
REFUSED = [
    pytest.param(row, id=row.name)
    for row in ROWS
    if row.twin is None and family_in({"model_type": row.model_type}) is None
]
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 16, "enable_prefix_caching": False}


@pytest.mark.parametrize("row", SERVED)
def test_a_published_checkpoint_gives_the_tokens_of_its_twin(row: Row, tmp_path: Path) -> None:
    assert row.twin is not None
    coded, twin = publish(row.twin, tmp_path)
    reference = compute_reference(twin)
    assert tokens(greedy(load(coded), reference.prompts)) == reference.outputs
    llm = load(coded, **CHUNKS)
    alone = [tokens(greedy(llm, [prompt]))[0] for prompt in reference.prompts]
    assert tuple(alone) == reference.outputs
    assert json.loads((coded / "config.json").read_text())["model_type"] == row.model_type
    assert set(row.twin.end_tokens) <= eos_token_ids(str(coded))
    tokenizer = Tokenizer.from_path(str(coded))
    assert tokenizer.decode(tokenizer.render_chat([{"role": "user", "content": "one"}])) == "user: one\n"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in MORE if row.twin and not row.twin.composite])
def test_a_tokenizer_needs_no_config_that_transformers_knows(row: Row, tmp_path: Path) -> None:
    assert row.twin is not None
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": row.model_type, **row.twin.fields}))
    tokenizer = Tokenizer.from_path(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("one")) == "one"


@pytest.mark.parametrize("row", REFUSED)
def test_the_others_are_refused_by_name(row: Row, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": row.model_type, "architectures": ["Any"]}))
    with pytest.raises(UnsupportedModelError, match=f"model_type '{row.model_type}' is not") as caught:
        read_config(str(tmp_path))
    assert "\n" not in caught.value.message


@pytest.mark.slow
def test_nvfp4_experts_beside_fp8_attention(tmp_path: Path) -> None:
    """As NVIDIA exports Qwen3.6: one checkpoint, two formats, told apart by the codes' type."""
    (tmp_path / "pair").mkdir()
    source = write_checkpoint(CASES["qwen3_moe"], tmp_path / "source")

    def form_of(name: str) -> Format:
        return modelopt_fp8() if "self_attn" in name else FORMATS["modelopt-nvfp4"]

    coded, twin = write_pair(source, tmp_path / "pair", FORMATS["modelopt-nvfp4"], form_of)
    layers = {"model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}, "lm_head": {"quant_algo": "NVFP4"}}
    note: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    edit(coded, {"quantization_config": note})
    reference = compute_reference(twin)
    assert tokens(greedy(load(coded), reference.prompts)) == reference.outputs
    # The same in the file that older exports have instead.
    older = Path(shutil.copytree(coded, tmp_path / "older"))
    config = json.loads((older / "config.json").read_text())
    del config["quantization_config"], note["quant_method"]
    (older / "config.json").write_text(json.dumps(config))
    (older / "hf_quant_config.json").write_text(json.dumps({"quantization": note}))
    assert tokens(greedy(load(older), reference.prompts)) == reference.outputs


@pytest.mark.slow
def test_compressed_tensors_of_two_formats(tmp_path: Path) -> None:
    """NVFP4 experts beside fp8 attention: each group has a format and names its modules."""
    (tmp_path / "pair").mkdir()
    source = write_checkpoint(CASES["qwen3_moe"], tmp_path / "source")
    forms = {"re:.*self_attn.*": FORMATS["ct-fp8"], "re:.*mlp.experts.*": FORMATS["ct-nvfp4"]}

    def form_of(name: str) -> Format:
        return forms["re:.*self_attn.*" if "self_attn" in name else "re:.*mlp.experts.*"]

    coded, twin = write_pair(source, tmp_path / "pair", FORMATS["ct-nvfp4"], form_of)
    groups = {
        f"group_{n}": {**form.config["config_groups"]["group_0"], "targets": [target], "format": form.config["format"]}
        for n, (target, form) in enumerate(forms.items())
    }
    note = {**FORMATS["ct-nvfp4"].config, "format": "mixed-precision", "config_groups": groups}
    edit(coded, {"quantization_config": note})
    reference = compute_reference(twin)
    assert tokens(greedy(load(coded), reference.prompts)) == reference.outputs
