"""The sampling flags that `generate` and `chat` share. Ranges are SamplingParams' own business."""

from __future__ import annotations

import argparse
from types import MappingProxyType

from moe_serve.cli.flags import add_flag, field_kinds, given
from moe_serve.config import EngineConfig, flag_name
from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.text.generation_defaults import read_generation_defaults

HELP_OF = MappingProxyType(
    {
        "max_tokens": "Longest answer, in tokens. Default: the checkpoint's, or up to the end of the context window.",
        "temperature": "0 always takes the likeliest token; higher is more varied. Default: the checkpoint's.",
        "top_p": "Sample from the likeliest tokens that together have this probability. Default: the checkpoint's.",
        "top_k": "Sample from this many likeliest tokens; 0 is all. Default: the checkpoint's.",
        "min_p": "Leave out tokens below this fraction of the likeliest one's probability. Default: the checkpoint's.",
        "presence_penalty": "Subtracted from the logit of tokens already generated. Default: 0.",
        "frequency_penalty": "Subtracted from a token's logit for each time it was generated. Default: 0.",
        "repetition_penalty": "Above 1 discourages tokens of the prompt and the answer. Default: the checkpoint's.",
        "ignore_eos": "Go on past the end-of-sequence token.",
    }
)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    kinds = field_kinds(SamplingParams)
    for name, help in HELP_OF.items():
        add_flag(group, name, kinds[name], help)
    group.add_argument(
        flag_name("stop"),
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="End before this text. Repeatable.",
    )


def sampling_from_args(args: argparse.Namespace, config: EngineConfig) -> SamplingParams:
    """The checkpoint's own defaults with the given flags on top, as the server does it.

    InvalidRequestError names the setting whose value is out of range.
    """
    settings = read_generation_defaults(config.model, config.generation_config)
    settings |= given(args, [*HELP_OF, "stop"])
    settings["stop"] = tuple(settings.get("stop", ()))
    return SamplingParams(**settings)
