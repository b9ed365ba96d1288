"""`moe-serve pack MODEL FILE`: write a checkpoint's experts into one file made for reading them one by one."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_model_argument
from moe_serve.errors import ConfigError

HELP = "Write the experts into one aligned file with checksums, for --moe-expert-file."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="Where to write; it must not exist yet.")


def run(args: argparse.Namespace) -> int:
    args.model = preflight.check_model(args.model)
    from tqdm import tqdm

    from expert_cache.storage import expert_file
    from moe_serve.hf import checkpoint

    if args.file.exists():
        raise ConfigError(f"FILE: {args.file} exists; remove it or choose another name")
    store = checkpoint.open_all_experts(args.model)
    _check_space(args.file, store.num_total * store.slot_bytes)
    with tqdm(total=store.num_total, desc="Packing experts", disable=None) as bar:
        try:
            expert_file.write(store, args.file, checkpoint.checkpoint_fingerprint(args.model), lambda: bar.update())
        except OSError as error:
            raise ConfigError(f"{args.file}: {error.strerror}") from error
    print(f"{args.file}: {store.num_total} experts of {store.expert_bytes} bytes", file=sys.stderr)
    print(f"moe-serve serve {args.model} --moe-expert-file {args.file} --moe-cache-mib N")
    return 0


def _check_space(file: Path, num_bytes: int) -> None:
    if not file.parent.is_dir():
        raise ConfigError(f"FILE: {file.parent} is no folder")
    free = shutil.disk_usage(file.parent).free
    if free < num_bytes:
        raise ConfigError(f"FILE: {num_bytes >> 20} MiB are needed in {file.parent}, {free >> 20} MiB are free")
