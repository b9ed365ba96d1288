"""`moe-serve generate [MODEL]`: complete one prompt without a server; text goes to stdout as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moe_serve.cli import preflight
from moe_serve.cli.flags import OF_SERVER, add_config_flags, add_model_argument, config_from_args
from moe_serve.cli.sampling import add_sampling_flags, sampling_from_args
from moe_serve.config import EngineConfig
from moe_serve.config.settings import refuse_no_effect
from moe_serve.errors import ConfigError

HELP = "Complete a prompt, without a server."
USAGE = "[MODEL] [flags]"
EXAMPLES = (
    'moe-serve generate --prompt "Once upon a time" --max-tokens 50',
    "moe-serve generate MODEL --temperature 0 < prompt.txt",
)
EXTRA_ARGUMENT = "give the text with --prompt"
SKIP = (*OF_SERVER, "chat_template")


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="The text to continue. Default: standard input.")
    add_sampling_flags(parser)
    add_config_flags(parser, EngineConfig, skip=SKIP)


def run(args: argparse.Namespace) -> int:
    config = config_from_args(args, EngineConfig)
    refuse_no_effect(config)
    config = preflight.check_engine(config)
    params, prompt = sampling_from_args(args, config), _prompt(args)
    preflight.say_importing()
    from moe_serve.llm import LLM

    for output in LLM(**vars(config)).stream(prompt, params):
        print(output.text, end="", flush=True)
    print()
    return 0


def _prompt(args: argparse.Namespace) -> str:
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    if not prompt:
        raise ConfigError("nothing to continue: give --prompt, or text on standard input")
    return str(prompt)
