"""`moe-serve quantize MODEL -o FOLDER`: a checkpoint whose experts take four or eight bits per weight; the other linear
layers too, if asked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_hub_flags, add_model_argument
from moe_serve.cli.outputs import check_outputs
from moe_serve.errors import ConfigError
from moe_serve_base.whole_files import whole_folder

HELP = "Quantise a checkpoint's experts to 4 or 8 bits, in compressed-tensors format."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_hub_flags(parser)
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True, help="It must not exist yet.")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="Per weight. Default: 4.")
    parser.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        help="Columns that share a scale; 0: one scale per row. Default: 128 for 4 bits, 0 for 8.",
    )
    parser.add_argument(
        "--dense",
        choices=("int8", "int4"),
        help="Quantise attention, shared experts and the output layer too, which changes answers further: int8 with one"
        " scale per row, int4 with one for 128 columns. Default: they stay as they are.",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="A text like those the model will see: scales are chosen for the least error on it.",
    )
    parser.add_argument(
        "--calibration-tokens",
        metavar="N",
        type=int,
        default=16384,
        help="Use at most N tokens of the file. Default: 16384.",
    )


def run(args: argparse.Namespace) -> int:
    args.model = preflight.model_of(args)
    from tqdm import tqdm

    from moe_serve.quantization.dense_choice import DENSE
    from moe_serve.quantization.writing import num_matrices, write_quantized

    dense = DENSE.get(args.dense)
    group = args.group_size if args.group_size is not None else 128 if args.bits == 4 else 0
    if group < 0 or group % 8:
        raise ConfigError(f"--group-size {group}: give a multiple of 8, or 0 for one scale per row")
    check_outputs(args, out=args.out)
    text = _read(args.calibration)
    importance = None
    if text is not None:
        from moe_serve.quantization.calibration import record

        importance = record(args.model, text, args.calibration_tokens).importance
    with (
        tqdm(total=num_matrices(args.model, dense), desc="Quantising", unit="matrix", disable=None) as bar,
        whole_folder(args.out) as partial,
    ):
        size = write_quantized(args.model, partial, args.bits, group, importance, lambda: bar.update(), dense)
    print(f"{args.out}: {size >> 20} MiB of tensors", file=sys.stderr)
    print(f"moe-serve serve {args.out}")
    return 0


def _read(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration: {file} cannot be read as text ({error})") from error
