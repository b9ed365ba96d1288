"""Flags and config dataclasses are one thing: every field can be set, and nothing else can."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe_serve.cli import main, parse
from moe_serve.cli.flags import add_config_flags, config_from_args, default_model, field_kinds
from moe_serve.cli.sampling import HELP_OF, add_sampling_flags, sampling_from_args
from moe_serve.config import EngineConfig, ServerConfig, flag_name
from moe_serve.scheduling.sequence import SamplingParams

CONFIGS = (EngineConfig, ServerConfig)
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
VALUE_OF = {"device": "cuda:1"}


def _parse(config: type, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_config_flags(parser, config)
    return parser.parse_args(argv)


def _other_value(config: Any, name: str) -> Any:
    """A valid value that is not the default."""
    kind = field_kinds(config)[name]
    default = getattr(config(), name)
    if kind is bool:
        return not default
    if kind is tuple:
        return ("one", "two")
    choices = next(f for f in dataclasses.fields(config) if f.name == name).metadata.get("choices")
    if choices:
        return next(choice for choice in choices if choice != default)
    return VALUE_OF.get(name, kind(7 if kind in (int, float) else "seven"))


def _argv(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag_name(name if value else f"no_{name}")]
    if isinstance(value, tuple):
        return [word for item in value for word in (flag_name(name), item)]
    return [flag_name(name), str(value)]


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda v: getattr(v, "__name__", v))
def test_every_field_round_trips(config: Any, name: str) -> None:
    value = _other_value(config, name)
    assert config_from_args(_parse(config, _argv(name, value)), config) == config(**{name: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_without_flags_the_defaults_hold(config: Any) -> None:
    assert config_from_args(_parse(config, []), config) == config()


def test_serve_takes_every_field_of_both_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "--help"])
    shown = capsys.readouterr().out
    missing = [flag_name(name) for _, name in FIELDS if name != "model" and f"{flag_name(name)}" not in shown]
    assert missing == []


def test_config_fields_do_not_collide() -> None:
    names = [name for _, name in FIELDS]
    assert len(set(names)) == len(names)


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
        (["serve", "--block-size", "0"], "--block-size must be positive, got 0"),
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
