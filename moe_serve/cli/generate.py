"""`moe-serve generate [MODEL]`: complete one prompt without a server; text goes to stdout as it comes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from moe_serve.cli.flags import add_config_flags, add_model_argument, config_from_args
from moe_serve.cli.sampling import add_sampling_flags, sampling_from_args
from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError

HELP = "Complete a prompt, without a server."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="The text to continue. Default: standard input.")
    add_sampling_flags(parser)
    add_config_flags(parser, EngineConfig, skip=("model",))


def run(args: argparse.Namespace) -> int:
    config = config_from_args(args, EngineConfig)
    params, prompt = sampling_from_args(args, config), _prompt(args)
    from moe_serve.llm import LLM

    for output in LLM(**vars_of(config)).stream(prompt, params):
        print(output.text, end="", flush=True)
    print()
    return 0


def vars_of(config: EngineConfig) -> dict[str, Any]:
    """The config as keyword arguments for LLM."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _prompt(args: argparse.Namespace) -> str:
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    if not prompt:
        raise ConfigError("nothing to continue: give --prompt, or text on standard input")
    return str(prompt)
