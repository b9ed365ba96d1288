"""`moe-serve pack MODEL FILE`: write a checkpoint's experts into one file made for reading them one by one."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_hub_flags, add_model_argument
from moe_serve.cli.outputs import add_force_flag
from moe_serve.errors import ConfigError
from moe_serve_base.whole_files import refusal

HELP = "Write the experts into one aligned file with checksums, for --moe-expert-file."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_hub_flags(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="Where to write.")
    add_force_flag(parser)


def run(args: argparse.Namespace) -> int:
    given, args.model = args.model, preflight.model_of(args)
    from tqdm import tqdm

    from expert_cache.storage import expert_file
    from moe_serve.hf import checkpoint

    problem = refusal(args.file, args.force)
    if problem is not None:
        raise ConfigError(f"FILE: {args.file} {problem}")
    store = checkpoint.open_all_experts(args.model)
    _check_space(args.file, store.num_total * store.slot_bytes)
    with tqdm(total=store.num_total, desc="Packing experts", disable=None) as bar:
        expert_file.write(store, args.file, checkpoint.checkpoint_fingerprint(args.model), lambda: bar.update())
    print(f"{args.file}: {store.num_total} experts of {store.expert_bytes} bytes", file=sys.stderr)
    print(f"moe-serve serve {given} --moe-expert-file {args.file} --moe-cache-mib N")
    return 0


def _check_space(file: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if free < num_bytes:
        raise ConfigError(f"FILE: {num_bytes >> 20} MiB are needed in {file.parent}, {free >> 20} MiB are free")
