"""`moe-serve pack MODEL FILE`: write a checkpoint's experts into one file made for reading them one by one."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_hub_flags, add_model_argument
from moe_serve.cli.outputs import add_force_flag
from moe_serve.errors import ConfigError
from moe_serve_base.whole_files import refusal

if TYPE_CHECKING:
    from expert_cache.storage import ExpertStore
    from expert_cache.storage.dense_codes import DenseCodes

HELP = "Write the experts into one aligned file with checksums, for --moe-expert-file."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_hub_flags(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="Where to write.")
    parser.add_argument(
        "--lossless",
        action="store_true",
        help="Write bf16 experts, and the other linear layers, in 12 bits a weight: every bit comes back, and the CPU"
        " computes from the codes.",
    )
    add_force_flag(parser)


def run(args: argparse.Namespace) -> int:
    given, args.model = args.model, preflight.model_of(args)
    from tqdm import tqdm

    from expert_cache.storage import expert_file, lossless
    from moe_serve.hf import checkpoint

    problem = refusal(args.file, args.force)
    if problem is not None:
        raise ConfigError(f"FILE: {args.file} {problem}")
    store = checkpoint.open_all_experts(args.model)
    if args.lossless and not lossless.is_bf16(store):
        raise ConfigError("--lossless: the experts of this checkpoint are not bf16; pack it without that flag")
    _check_space(args.file, store.num_total * store.slot_bytes)
    source = checkpoint.checkpoint_fingerprint(args.model)
    dense = _dense_codes(args.model) if args.lossless else None
    with tqdm(total=store.num_total, desc="Packing experts", disable=None) as bar:
        expert_file.write(store, args.file, source, lambda: bar.update(), is_coded=args.lossless, dense=dense)
    _say_size(args.file, store, expert_file.read(args.file)[0])
    print(f"moe-serve serve {given} --moe-expert-file {args.file} --moe-cache-mib N")
    return 0


def _dense_codes(model: str) -> DenseCodes:
    """Of attention, shared experts, dense MLPs and the output layer."""
    import torch

    from expert_cache.storage import dense_codes
    from moe_serve.hf.checkpoint import dense_tensors
    from moe_serve.hf.config_file import read_config
    from moe_serve.hf.family import family_of
    from moe_serve.quantization.dense_choice import DenseChoice

    config = read_config(model)
    family = family_of(config)
    choice = DenseChoice(config, family, None)
    stored = ((each.name, each.tensor) for each in dense_tensors(model, family, None))
    return dense_codes.coded(
        (name, tensor)
        for name, tensor in stored
        if tensor.dtype == torch.bfloat16 and choice.is_linear(name, tuple(tensor.shape))
    )


def _say_size(file: Path, original: ExpertStore, packed: ExpertStore) -> None:
    share = packed.total_bytes / original.total_bytes
    size = f", {share:.3f} of the checkpoint's" if share < 1 else ""
    print(f"{file}: {packed.num_total} experts of {packed.expert_bytes} bytes{size}", file=sys.stderr)


def _check_space(file: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if free < num_bytes:
        raise ConfigError(f"FILE: {num_bytes >> 20} MiB are needed in {file.parent}, {free >> 20} MiB are free")
