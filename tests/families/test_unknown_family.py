"""A model we cannot run is refused at once, with the list of those we can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from moe_serve import LLM
from moe_serve.errors import ConfigError, UnsupportedModelError
from moe_serve.hf.families import MISSING, family_names
from tests.support.scripts import docs_script

NAMED_IN_THE_ISSUE = {
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "phimoe",
    "granitemoe",
    "glm4_moe",
    "ernie4_5_moe",
}


def test_the_promised_families_are_family_names() -> None:
    assert set(family_names()) >= NAMED_IN_THE_ISSUE


@pytest.mark.parametrize("model_type", ["llama", "dbrx", "gpt2"])
def test_a_family_we_lack_is_refused_with_the_list(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        LLM(str(tmp_path))
    assert model_type in caught.value.message
    assert all(family in caught.value.message for family in family_names())


@pytest.mark.parametrize(("model_type", "kind"), [("zaya", "convolutions"), ("hy_v4", "sinks")])
def test_what_a_known_family_needs_is_said(model_type: str, kind: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"model_type '{model_type}' is not served: it needs .*{kind}"):
        LLM(str(tmp_path))


def test_no_family_is_both_served_and_missing() -> None:
    assert not set(MISSING) & set(family_names())


def test_every_model_of_transformers_with_experts_is_served_or_lacks_something() -> None:
    """docs/families.md lists them; a name that transformers does not have would hide one."""
    writer = docs_script("write_families")
    served = writer.families_by_model()
    models = writer.models_with_experts()
    assert len(models) > 60
    assert "" not in served, "a family's experts are nowhere in transformers"
    assert [m for m in models if not served.get(m) and writer.missing_of(m) is None] == []
    listed = {writer.missing_of(m) for m in models if not served.get(m)}
    assert set(MISSING.values()) <= listed, "missing, but served or unknown to transformers"


def test_a_model_type_nobody_knows_is_refused_naming_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moe_of_tomorrow"}))
    with pytest.raises(ConfigError) as caught:
        LLM(str(tmp_path))
    assert "moe_of_tomorrow" in caught.value.message
    assert all(family in caught.value.message for family in family_names())


def test_an_unknown_quantisation_is_refused_naming_its_method(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mixtral").to_dict() | {"quantization_config": {"quant_method": "sorcery"}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.quant_method is 'sorcery'"):
        LLM(str(tmp_path))
