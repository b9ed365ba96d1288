"""Over ranks as on one device: another placement in the middle, grammars, log-probabilities, routes, expert counts.

One launch runs all cases, because starting ranks is what takes time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moe_serve.hf.config_file import read_config
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec, SamplingParams
from moe_serve.spec import ModelSpec

from . import rank_cases
from .references import NEW_TOKENS, Reference
from .serving import SMALL_ENGINE, load
from .test_parallel import LAUNCH_S, free_port, launch, torchrun, write_plan

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]

MODES = ({"ep_mode": "conventional"}, {"ep_mode": "coherent"})
ENGINE = {**SMALL_ENGINE, "max_num_batched_tokens": 48, "enable_prefix_caching": False}
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
GRAMMAR = SamplingParams(temperature=0, max_tokens=20, grammar=GrammarSpec(GrammarKind.REGEX, "[a-d]{4}(xy|z){2,3}"))
RANDOM = SamplingParams(
    temperature=0.8, top_p=0.9, seed=11, max_tokens=NEW_TOKENS, bad_words=((7,), (8, 9)), logit_bias={5: 4.0},
    repetition_penalty=1.2, n=1, stop_token_ids=(3,),
)  # fmt: skip


def case_of(folder: Path, reference: Reference, params: SamplingParams, **more: Any) -> dict[str, Any]:
    spec = ModelSpec.from_hf(read_config(str(folder)))
    return {
        "folder": str(folder),
        "num_experts": spec.num_experts,
        "prompts": [list(prompt) for prompt in reference.prompts],
        "params": as_json(params),
        "engine": ENGINE,
        "parallel": {},
        **more,
    }


def as_json(params: SamplingParams) -> dict[str, Any]:
    """Fields that are not the default."""
    default = SamplingParams()
    changed = {f.name: value for f in fields(params) if (value := getattr(params, f.name)) != getattr(default, f.name)}
    plain: dict[str, Any] = msgspec.to_builtins(changed, str_keys=True)
    return plain


def cases(checkpoint: Checkpoint, reference: References, folder: Path) -> list[dict[str, Any]]:
    """For both modes. Plans change while prompts are being computed, and while all sequences decode."""
    found = []
    for family in ("mixtral", "deepseek_v3"):
        model, ref = checkpoint(family), reference(family)
        planned, replicated = write_plan(folder, model, 0, 0), write_plan(folder, model, 1, 2)
        for parallel in MODES:
            places = {"1": planned, "6": replicated, "11": planned}
            found.append(
                case_of(
                    model, ref, GREEDY, parallel=parallel, places=places, routes=True,
                    engine={**ENGINE, "moe_cache_mib": 1},
                )
            )  # fmt: skip
            if family == "mixtral":
                found += [case_of(model, ref, params, parallel=parallel) for params in (GRAMMAR, RANDOM)]
    return found


@pytest.mark.timeout(LAUNCH_S + 60)
@pytest.mark.slow
def test_over_ranks_as_on_one_device(checkpoint: Checkpoint, reference: References, tmp_path: Path) -> None:
    asked = cases(checkpoint, reference, tmp_path)
    results = launch(torchrun(free_port()), asked, tmp_path)
    for case, result in zip(asked, results, strict=True):
        alone = rank_cases.serve(load(Path(case["folder"]), **case["engine"]).engine, {**case, "places": {}})
        label = case["folder"], case["parallel"], case["params"]
        assert result["errors"] == alone["errors"] == {}, label
        assert result["tokens"] == alone["tokens"], label
        for ours, theirs in zip(result["logprobs"], alone["logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), label
        if case.get("routes"):
            check_counts(case, result, alone)
        elif "grammar" in case["params"]:
            check_grammar(case, result)


def check_counts(case: dict[str, Any], result: dict[str, Any], alone: dict[str, Any]) -> None:
    """Every token's routes came to the front, every choice was counted once, caches hold what their rank runs."""
    assert result["steps"] > max(map(int, case["places"]))
    assert result["routes"] == alone["routes"]
    routes = np.array([token for request in result["routes"].values() for token in request])
    counts = [np.bincount(routes[:, i].ravel(), minlength=case["num_experts"]).tolist() for i in range(routes.shape[1])]
    if case["parallel"]["ep_mode"] == "coherent":
        computed = np.array(result["expert_tokens"])
        assert (computed[:-1] >= counts[:-1]).all()  # what every rank holds, every rank may compute
        assert (computed[-1] <= counts[-1]).all()  # after the last layer only tokens to sample are needed
    else:
        assert result["expert_tokens"] == counts
    assert result["strays"] == [0, 0]
    assert all(result["resident"])


def check_grammar(case: dict[str, Any], result: dict[str, Any]) -> None:
    tokenizer = load(Path(case["folder"])).tokenizer
    for tokens in result["tokens"]:
        assert re.fullmatch("[a-d]{4}(xy|z){2,3}", tokenizer.decode(tokens, skip_special_tokens=True)), tokens
