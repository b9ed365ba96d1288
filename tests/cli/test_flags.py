"""Flags and config dataclasses are one thing: every field can be set, and nothing else can."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from moe_serve.cli import main, parse
from moe_serve.cli.flags import add_config_flags, config_from_args, default_model
from moe_serve.cli.sampling import HELP_OF, add_sampling_flags, sampling_from_args
from moe_serve.config import EngineConfig, ExpertCacheConfig, KVConfig, ParallelConfig, ServerConfig, flag_name
from moe_serve.config.settings import Setting, Settings, refuse_no_effect, settings_of
from moe_serve.errors import ConfigError
from moe_serve.scheduling.sequence import SamplingParams

CONFIGS = (EngineConfig, ServerConfig, ParallelConfig)
SETTINGS = [(config, setting) for config in CONFIGS for setting in settings_of(config)]
VALUE_OF = {"device": "cuda:1", "expert_plan_margin": 0.5, "ep_groups": 2, "ep_context": "auto"}
NEEDS: dict[str, dict[str, Any]] = {
    "expert_aware_batching": {"max_num_batched_seqs": 4},
    "moe_prefetch": {"moe_predictor": "file"},
    "moe_io": {"moe_expert_file": "file"},
    "expert_plan": {"devices": 2},
    "ep_predictor": {"devices": 2},
    "ep_groups": {"devices": 2},
    "expert_plan_interval_s": {"devices": 2},
}
"""What must be given beside a setting, or it is refused."""


def _parse(config: type[Settings], argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_flags(parser, config)
    return parser.parse_args(argv)


def _other_value(setting: Setting) -> Any:
    """A valid value that is not the default."""
    if setting.kind is bool:
        return not setting.field.default
    if setting.kind is tuple:
        return ("one", "two")
    if setting.choices:
        return next(choice for choice in reversed(setting.choices) if choice != setting.field.default)
    return VALUE_OF.get(setting.name, setting.kind(7 if setting.kind in (int, float) else "seven"))


def _argv(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag_name(name if value else f"no_{name}")]
    if isinstance(value, tuple):
        return [word for item in value for word in (flag_name(name), item)]
    return [flag_name(name), str(value)]


def _value(config: Settings, setting: Setting) -> Any:
    home = config if setting.part is None else getattr(config, setting.part)
    return getattr(home, setting.field.name)


@pytest.mark.parametrize(("config", "setting"), SETTINGS, ids=lambda v: getattr(v, "__name__", None) or v.name)
def test_every_setting_round_trips_by_each_of_its_names(config: type[Settings], setting: Setting) -> None:
    value, others = _other_value(setting), NEEDS.get(setting.name, {})
    beside = [word for name, other in others.items() for word in _argv(name, other)]
    for name in (setting.name, *setting.aliases):
        found = config_from_args(_parse(config, [*_argv(name, value), *beside]), config)
        assert dataclasses.is_dataclass(found)
        assert _value(found, setting) == value
        assert found == config.of(**{name: value, **others})
        assert found == config.from_dict(dataclasses.asdict(found)), "as ranks get it"
        assert found.replace(**{name: setting.field.default}) == config.of(**others)


@pytest.mark.parametrize("config", CONFIGS)
def test_without_flags_the_defaults_hold(config: type[Settings]) -> None:
    assert config_from_args(_parse(config, []), config) == config()


def test_serve_takes_every_field_of_both_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "--help"])
    shown = capsys.readouterr().out
    words = set(re.findall(r"--[\w-]+", shown))
    assert {setting.flag for _, setting in SETTINGS} - words == {"--model"}
    assert not {flag_name(alias) for _, setting in SETTINGS for alias in setting.aliases} & words


def test_no_two_settings_share_a_name() -> None:
    names = [name for _, setting in SETTINGS for name in (setting.name, *setting.aliases)]
    assert len(set(names)) == len(names)


def test_units_are_in_names() -> None:
    """A time or a memory size says in what it is given."""
    timed = re.compile("second|MiB")
    for _, setting in SETTINGS:
        if setting.kind in (int, float) and timed.search(setting.field.metadata["help"]):
            assert setting.name.endswith(("_s", "_mib")) or "per second" in setting.field.metadata["help"]


def test_flat_and_nested_are_the_same() -> None:
    flat = EngineConfig.of(model="m", moe_cache_mib=64, block_size=8)
    assert flat == EngineConfig(model="m", experts=ExpertCacheConfig(cache_mib=64), kv=KVConfig(page_size=8))
    assert flat == EngineConfig.of(model="m", experts=ExpertCacheConfig(cache_mib=64), page_size=8)
    assert flat.replace(moe_cache_pool="global").experts == ExpertCacheConfig(cache_mib=64, cache_pool="global")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"max_num_sqs": 3}, "EngineConfig has no setting 'max_num_sqs'; did you mean max_num_seqs"),
        ({"moe_cache_mb": 3}, "did you mean moe_cache_mib"),
        ({"max_num_seqs": "3"}, "--max-num-seqs takes int, got '3'"),
        ({"max_num_seqs": True}, "--max-num-seqs takes int"),
        ({"max_queue_wait_s": float("nan")}, "--max-queue-wait-s must be positive"),
        ({"moe_cache_mib": -1}, "--moe-cache-mib must not be negative"),
        ({"seed": None}, "--seed takes int, got None"),
        ({"moe_prefetch": "predictor"}, "--moe-prefetch predictor needs --moe-predictor"),
        ({"moe_io": "deepspeed"}, "give --moe-expert-file"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        EngineConfig.of(**values)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            EngineConfig.of(moe_cache_mib=0, moe_prefetch="affinity"),
            "--moe-prefetch has no effect with --moe-cache-mib 0",
        ),
        (EngineConfig.of(moe_predictor="file"), "--moe-predictor needs --moe-prefetch predictor"),
        (EngineConfig.of(moe_prefetch_audit=False), "--no-moe-prefetch-audit has no effect"),
        (EngineConfig.of(max_skipped_steps=3), "--max-skipped-steps has no effect without --max-num-batched-seqs"),
        (ServerConfig(recording_buffer_tokens=3), "--recording-buffer-tokens has no effect without --recording-dir"),
        (ParallelConfig(ep_mode="coherent"), "--ep-mode has no effect on one device"),
        (ParallelConfig(devices=2, ep_context="auto"), "--ep-context has no effect without --ep-mode coherent"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_flag_without_effect_is_refused(config: Settings, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        refuse_no_effect(config)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig.of(moe_predictor="file", moe_cache_policy="predicted"),
        EngineConfig.of(moe_cache_mib=0, moe_expert_file="file"),
        ParallelConfig(devices=2, ep_mode="coherent", ep_context="auto"),
        *(config() for config in CONFIGS),
    ],
)
def test_a_flag_with_effect_is_not(config: Settings) -> None:
    refuse_no_effect(config)


def test_help_states_the_default_once() -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser, EngineConfig)
    shown = " ".join(parser.format_help().split())
    assert "Tokens in one KV page. Default: 16." in shown
    assert "70 % of free memory" in shown


def test_the_default_model_is_in_the_package() -> None:
    args = parse(["serve"])
    assert args.model == default_model()
    assert Path(args.model).parts[-3:] == ("moe_serve", "demo", "model")
    assert parse(["serve", "elsewhere"]).model == "elsewhere"


def _sampling(config: EngineConfig, *argv: str) -> SamplingParams:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    return sampling_from_args(parser.parse_args(argv), config)


def test_sampling_flags_round_trip(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path))
    assert _sampling(config) == SamplingParams()
    argv = ["--max-tokens", "5", "--temperature", "0", "--ignore-eos", "--stop", "a", "--stop", "b"]
    expected = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, stop=("a", "b"))
    assert _sampling(config, *argv) == expected


def test_sampling_starts_from_the_checkpoints_defaults(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 40}')
    auto, neutral = (EngineConfig(model=str(tmp_path), generation_config=mode) for mode in ("auto", "vllm"))
    assert _sampling(auto) == SamplingParams(temperature=0.7, top_k=40)
    assert _sampling(auto, "--top-k", "5") == SamplingParams(temperature=0.7, top_k=5)
    assert _sampling(neutral) == SamplingParams()


def test_sampling_flags_are_fields() -> None:
    assert set(HELP_OF) <= {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["serve", "--max-num-sqs", "3"], "unknown flag --max-num-sqs; did you mean --max-num-seqs?"),
        (["serve", "--enable-prefix-cachin=1"], "did you mean --enable-prefix-caching?"),
        (["bench", "serve", "--num-prompt", "3"], "did you mean --num-prompts?"),
        (["serve", "--zzz"], "unknown flag --zzz (see"),
        (["serve", "model", "another"], "unexpected argument: another"),
        (["serve", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["sevre"], "invalid choice: 'sevre'"),
    ],
)
def test_a_mistyped_flag_is_one_helpful_line(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert complaint in lines[0]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["serve", "--page-size", "0"], "--page-size must be positive, got 0"),
        (["serve", "--block-size", "0"], "--page-size must be positive, got 0"),
        (["serve", "--device", "tpu"], "--device: 'tpu' is not"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature must be between 0"),
        (["generate", "--prompt", ""], "nothing to continue"),
    ],
)
def test_a_bad_value_is_one_line_and_status_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("moe-serve: error: ")
    assert complaint in err
    assert len(err.splitlines()) == 1
