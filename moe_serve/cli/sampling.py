"""The sampling flags that `generate` and `chat` share. Ranges are SamplingParams' own business."""

from __future__ import annotations

import argparse
from types import MappingProxyType

from moe_serve.cli.flags import add_flag, field_kinds, given
from moe_serve.config import flag_name
from moe_serve.sequence import SamplingParams

HELP_OF = MappingProxyType(
    {
        "max_tokens": "Longest answer, in tokens. Default: up to the end of the context window.",
        "temperature": "0 always takes the likeliest token; higher is more varied. Default: 1.",
        "top_p": "Sample from the likeliest tokens that together have this probability. Default: 1, all.",
        "top_k": "Sample from this many likeliest tokens. Default: 0, all.",
        "min_p": "Leave out tokens less likely than this fraction of the likeliest one's probability. Default: 0.",
        "presence_penalty": "Subtracted from the logit of tokens already generated. Default: 0.",
        "frequency_penalty": "Subtracted from a token's logit for each time it was generated. Default: 0.",
        "repetition_penalty": "Above 1 discourages tokens of the prompt and the answer. Default: 1.",
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


def sampling_from_args(args: argparse.Namespace) -> SamplingParams:
    """InvalidRequestError names the flag whose value is out of range."""
    settings = given(args, [*HELP_OF, "stop"])
    settings["stop"] = tuple(settings.get("stop", ()))
    return SamplingParams(**settings)
