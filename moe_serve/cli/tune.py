"""`moe-serve tune MODEL`: measure the expert kernels' configurations on this machine's GPU and keep the fastest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_hub_flags, add_model_argument
from moe_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from moe_serve_kernels.gpu.configs import Config
    from moe_serve_kernels.gpu.tuned import Shape

HELP = "Measure which kernel configurations are fastest for a model's experts on this GPU, and use them from now on."
FORMATS = ("plain", "int8", "fp8", "int8_groups", "fp8_blocks", "int4", "mxfp4", "nvfp4")


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_hub_flags(parser)
    parser.add_argument(
        "--format", choices=FORMATS, default="plain", help="How weights are kept; plain: as bf16. Default: plain."
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="T", help="Numbers of tokens in a step. Default: 1, 2, 4 .. 4096."
    )


def run(args: argparse.Namespace) -> int:
    args.model = preflight.model_of(args)
    import torch

    from moe_serve_kernels import gpu
    from moe_serve_kernels.gpu import tuned

    if any(tokens < 1 for tokens in args.tokens or ()):
        raise ConfigError("--tokens must be positive")
    shape = _shape(args.model, args.format)
    if not torch.cuda.is_available():
        raise ConfigError("tune needs a GPU, and torch sees none; without one, nothing has to be tuned")
    device = torch.device("cuda")
    if not gpu.is_available(device):
        raise ConfigError("tune needs triton, which is not installed: pip install 'moe-serve-engine[gpu]'")
    name = torch.cuda.get_device_name(device)
    path = tuned.path_of(name)
    found = dict(tuned.load(name))
    found[shape.key] = found.get(shape.key, {}) | _tune(shape, device, args.tokens)
    tuned.write(path, found)
    print(f"{path}: {shape.key}, {len(found[shape.key])} numbers of tokens")
    return 0


def _shape(model: str, format: str) -> Shape:
    from moe_serve.hf.config_file import read_config
    from moe_serve.spec import ModelSpec
    from moe_serve_kernels.gpu.tuned import Shape
    from moe_serve_kernels.gpu.weight_format import FORMATS as KNOWN

    spec = ModelSpec.from_hf(read_config(model))
    kept = next(known for known in KNOWN if known == format)
    return Shape(spec.expert_hidden_size, spec.expert_intermediate_size, spec.num_experts, spec.top_k, kept)


def _tune(shape: Shape, device: torch.device, tokens: Sequence[int] | None) -> dict[int, Config]:
    import torch

    from moe_serve_kernels.gpu import tuning
    from moe_serve_kernels.gpu.gpu_model import model_of

    pool, tables = tuning.random_layers(shape, torch.bfloat16, device)
    best = {}
    for num_tokens in sorted(tokens or tuning.TOKENS):
        measure = tuning.measure_on(pool, tables, shape, num_tokens, torch.bfloat16)
        best[num_tokens], seconds = tuning.tune(model_of(device), shape, num_tokens, measure)
        print(f"{num_tokens:>6} tokens {seconds * 1e6:>9.1f} us  {best[num_tokens]}")
    return best
