"""Prefixes that survive a restart: a new engine loads them, and answers as one that computes everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import moe_serve
from moe_serve import LLM, SamplingParams
from moe_serve.config import EngineConfig
from moe_serve.engine.arrivals import Arrivals
from moe_serve.errors import ConfigError
from moe_serve.llm import RequestResult
from moe_serve.scheduling.sequence import Request
from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES

DEMO = Path(moe_serve.__file__).parent / "demo" / "model"
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
PROMPT = [5 + 7 * i % 200 for i in range(100)]


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    fixed = {"prefix_cache_dir": str(folder), "num_threads": 1, "max_num_seqs": 4, "num_kv_pages": 64}
    llm = LLM(str(DEMO), **{**fixed, "device": "cpu", "dtype": "float32", "max_model_len": 512, **settings})
    try:
        yield llm
        llm.engine.check_integrity()
        assert llm.engine.pool.num_free == llm.engine.num_pages
    finally:
        llm.close()


def arrivals(llm: LLM) -> Arrivals:
    found = llm.engine._arrivals
    assert found is not None
    return found


def answer(llm: LLM, prompt: list[int] = PROMPT) -> RequestResult:
    return llm.generate([prompt], PARAMS)[0]


def scored(result: RequestResult) -> Any:
    completion = result.completions[0]
    return completion.token_ids, [(entry.logprob, entry.top) for entry in completion.logprobs or ()]


def disk_tokens(llm: LLM) -> int:
    return arrivals(llm).tier.totals.hit_tokens


def test_the_next_turn_computes_its_new_tokens_alone(tmp_path: Path) -> None:
    with engine(tmp_path) as llm:
        first = answer(llm)
    turn = [*PROMPT, *first.completions[0].token_ids, 9, 10, 11]
    with engine(tmp_path / "empty") as llm:
        cold = answer(llm, turn)
    with engine(tmp_path) as llm:
        warm = answer(llm, turn)
        assert (warm.num_cached_tokens, disk_tokens(llm)) == (96, 96)
        assert scored(warm) == scored(cold)
        again = answer(llm, turn)
        assert (again.num_cached_tokens, disk_tokens(llm)) == (96, 96), "memory goes first"


@pytest.mark.slow
def test_a_damaged_page_ends_the_prefix_there(tmp_path: Path) -> None:
    with engine(tmp_path) as llm:
        first = answer(llm)
        third = list(llm.engine.pool._page_of)[2].hex()
    file = next(tmp_path.rglob(f"{third}.page"))
    file.write_bytes(file.read_bytes()[:-1])
    with engine(tmp_path) as llm:
        warm = answer(llm)
        assert (warm.num_cached_tokens, arrivals(llm).tier.totals.refused_files) == (32, 1)
        assert scored(warm) == scored(first)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"page_size": 8}, {"max_model_len": 256}, {"enforce_eager": True}])
def test_pages_of_other_settings_are_not_used(changed: dict[str, Any], tmp_path: Path) -> None:
    with engine(tmp_path) as llm:
        answer(llm)
    with engine(tmp_path, **changed) as llm:
        assert answer(llm).num_cached_tokens == 0


def test_salts_stay_apart(tmp_path: Path) -> None:
    def run(llm: LLM, salt: str) -> int:
        llm.engine.add_request(Request(f"of {salt}", tuple(PROMPT), PARAMS, cache_salt=salt))
        outputs = []
        while llm.engine.has_work():
            outputs += llm.engine.step()
        return outputs[-1].num_disk_tokens

    with engine(tmp_path) as llm:
        assert run(llm, "a") == 0
    with engine(tmp_path) as llm:
        assert (run(llm, "b"), run(llm, "a")) == (0, 96)


def test_a_request_can_be_aborted_while_its_prefix_is_loaded(tmp_path: Path) -> None:
    with engine(tmp_path) as llm:
        answer(llm)
    with engine(tmp_path) as llm:
        llm.engine.add_request(Request("gone", tuple(PROMPT), PARAMS))
        llm.engine.check_integrity()
        assert llm.engine.is_waiting("gone")
        llm.engine.abort("gone")
        while arrivals(llm)._loads:
            llm.engine.step()


@pytest.mark.slow
def test_a_pool_with_few_free_pages_takes_the_beginning(tmp_path: Path) -> None:
    with engine(tmp_path) as llm:
        first = answer(llm)
    with engine(tmp_path, num_kv_pages=8) as llm:
        others = [[30 + i] * 20 for i in range(3)]
        results = llm.generate([*others, PROMPT], PARAMS)
        assert scored(results[-1]) == scored(first)


@pytest.mark.slow
def test_states_come_back_too(tmp_path: Path) -> None:
    recurrent = write_checkpoint(CASES["lfm2_moe"], tmp_path / "model")
    settings = {"state_block_size": 32}
    prompt = [3 + 11 * i % 240 for i in range(100)]
    folder = tmp_path / "prefixes"

    def run() -> tuple[RequestResult, int]:
        fixed: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1, "max_num_seqs": 4}
        llm = LLM(str(recurrent), num_kv_pages=64, prefix_cache_dir=str(folder), **fixed, **settings)
        try:
            result = llm.generate([prompt], PARAMS)[0]
            llm.engine.check_integrity()
            return result, arrivals(llm).tier.totals.hit_tokens
        finally:
            llm.close()

    cold, none = run()
    warm, loaded = run()
    assert (none, loaded, warm.num_cached_tokens) == (0, 96, 96)
    assert scored(warm) == scored(cold)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--prefix-cache-dir"), engine(tmp_path / "file" / "x"):
        raise AssertionError("no engine starts")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_cache_dir": "x", "enable_prefix_caching": False}, "cannot go with --no-enable-prefix-caching"),
        ({"prefix_cache_disk_mib": 5}, "has no effect without --prefix-cache-dir"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    def told() -> str | None:
        return EngineConfig.of(model="m", **settings).no_effect()

    if "no effect" in message:
        assert message in (told() or "")
    else:
        with pytest.raises(ConfigError, match=message):
            told()
