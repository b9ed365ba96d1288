"""`moe-serve trace [MODEL] --prompts FILE -o TRACE`: run prompts and record which experts every token goes to."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_serve.cli import preflight
from moe_serve.cli.flags import OF_SERVER, add_config_flags, add_model_argument, config_from_args
from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.cli.prompt_files import read_prompts
from moe_serve.cli.sampling import add_sampling_flags, sampling_from_args
from moe_serve.config import EngineConfig
from moe_serve.config.settings import refuse_no_effect

if TYPE_CHECKING:
    from moe_serve.llm import LLM, Prompt
    from moe_serve.scheduling.sequence import SamplingParams
    from predictors.trace import RoutingTrace

HELP = "Run prompts and record the experts of every token, for replay, plan and predictor."
USAGE = "[MODEL] --prompts FILE -o TRACE [flags]"
EXAMPLES = ("moe-serve trace MODEL --prompts questions.txt -o routes.npz",)
MAX_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        required=True,
        help=".txt: one prompt per line. .jsonl, .json: objects with prompt, question, text, turns or conversations.",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="TRACE", required=True, help="The .npz file to write.")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="Only the first N. Default: all.")
    parser.add_argument("--chat", action="store_true", help="Put each prompt into the model's chat template.")
    parser.add_argument("--no-weights", action="store_true", help="Leave out the router's weights: a smaller file.")
    add_force_flag(parser)
    add_sampling_flags(parser)
    add_config_flags(parser, EngineConfig, skip=(*OF_SERVER, "enable_prefix_caching"))


def run(args: argparse.Namespace) -> int:
    config = config_from_args(args, EngineConfig).replace(enable_prefix_caching=False)
    params = sampling_from_args(args, config)
    if params.max_tokens is None:
        params = dataclasses.replace(params, max_tokens=MAX_TOKENS)
    prompts = read_prompts(args.prompts, args.num_prompts)
    refuse_no_effect(config)
    check_outputs(args, output=args.output)
    config = preflight.check_engine(config)
    preflight.say_importing()
    from moe_serve.hf.checkpoint import checkpoint_fingerprint
    from moe_serve.llm import LLM

    meta = {"model": config.model, "fingerprint": checkpoint_fingerprint(config.model), "prompts": args.prompts.name}
    llm = LLM(**vars(config))
    found = record(llm, _token_ids(llm, prompts, args.chat), params, not args.no_weights, meta)
    found.save(args.output)
    print(
        f"{args.output}: {found.num_tokens} tokens of {found.num_sequences} sequences, {found.num_layers} layers of"
        f" {found.num_experts} experts, top {found.top_k}",
        file=sys.stderr,
    )
    return 0


def record(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, weights: bool, meta: dict[str, Any]
) -> RoutingTrace:
    """Complete the prompts (token ids) together; every computed token's route, sequences in the order of `prompts`."""
    from moe_serve.expert_routes.route_recorder import RouteRecorder

    most = sum(len(prompt) + (params.max_tokens or 0) for prompt in prompts) * params.n
    recorder = RouteRecorder(llm.engine.routing_shape(), most, weights, token_ids=True)
    llm.engine.observe_routes(recorder)
    llm.generate(prompts, params, show_progress=True)
    llm.engine.observe_routes(recorder, wanted=False)
    return recorder.trace(meta)


def _token_ids(llm: LLM, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    if chat:
        return [llm.render_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    return [llm.tokenizer.encode(prompt) for prompt in prompts]
