"""`moe-serve doctor [MODEL]`: what this machine can do, what fits, what is missing, and how to start."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_hub_flags, add_model_argument, default_model
from moe_serve.errors import ConfigError

if TYPE_CHECKING:
    from moe_serve.doctor.findings import Finding, Hardware
    from moe_serve.doctor.fit import Fit, Sizes
    from moe_serve.doctor.rates import Rates

HELP = "Measure this machine and say what of a model fits, what is missing, and how to serve it."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_hub_flags(parser)
    parser.add_argument(
        "--moe-expert-file", metavar="FILE", type=Path, help="Experts are read from there (made by `moe-serve pack`)."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead.")


def run(args: argparse.Namespace) -> int:
    """Status 1 if something was found with which serving would fail."""
    given, args.model = args.model, preflight.model_of(args)
    expert_file = _expert_file(args)
    import torch

    from moe_serve import resolve
    from moe_serve.config import EngineConfig
    from moe_serve.doctor import findings, fit, rates
    from moe_serve.hf.checkpoint import weight_files
    from moe_serve.hf.config_file import read_config
    from moe_serve.memory import free_bytes
    from moe_serve.spec import ModelSpec

    config = EngineConfig(model=args.model)
    device = resolve.device_of(config)
    dtype = resolve.dtype_of(config, ModelSpec.from_hf(read_config(args.model)), device)
    machine, problems = findings.hardware(), findings.findings()
    sizes = fit.sizes_of(args.model, dtype, device, expert_file)
    files = [Path(file) for file in ([expert_file] if expert_file else weight_files(args.model))]
    measured = rates.measure(files, resolve.num_threads_of(config), device)
    found = fit.fit(sizes, measured, free_bytes(torch.device(device)), device.type == "cpu")
    if not found.dense_fits:
        what = f"the dense weights alone take {_gb(sizes.dense_bytes)}, more than is free"
        problems.append(findings.Finding(what, "a machine or a container with more memory", is_error=True))
    command = command_line(given, found, expert_file)
    if args.json:
        parts: dict[str, Any] = {"hardware": machine, "rates": measured, "sizes": sizes, "fit": found}
        shown = {name: dataclasses.asdict(part) for name, part in parts.items()}
        print(json.dumps({**shown, "findings": [dataclasses.asdict(p) for p in problems], "command": command}))
    else:
        print("\n".join(_report(machine, measured, sizes, found, problems, command)))
    return int(any(p.is_error for p in problems))


def _expert_file(args: argparse.Namespace) -> str | None:
    """The user's; ConfigError if it is not there."""
    if args.moe_expert_file is not None and not args.moe_expert_file.is_file():
        raise ConfigError(f"--moe-expert-file: there is no file {args.moe_expert_file}")
    return None if args.moe_expert_file is None else str(args.moe_expert_file)


def command_line(model: str, found: Fit, expert_file: str | None = None) -> str:
    """How to serve `model` here."""
    words = ["moe-serve", "serve"]
    if model != default_model():
        words.append(shlex.quote(model))
    if expert_file is not None:
        words += ["--moe-expert-file", shlex.quote(expert_file)]
    if not found.all_experts_fit and found.moe_cache_mib is not None:
        words += ["--moe-cache-mib", str(found.moe_cache_mib), "--moe-prefetch", "next-gate"]
    return " ".join(words)


def _report(
    machine: Hardware, rates: Rates, sizes: Sizes, found: Fit, problems: Sequence[Finding], command: str
) -> Iterator[str]:
    bf16 = "native bf16" if machine.native_bf16 else "no native bf16"
    yield "Machine"
    yield _row("CPU", f"{machine.cpu}, {machine.num_cores} cores, {bf16}")
    yield _row("GPU", ", ".join(machine.gpus) or "none")
    yield _row("free memory", _gb(machine.free_memory_bytes))
    yield "Measured"
    yield _row("memory", _gb(rates.memory_bytes_per_s) + "/s")
    yield _row("disk", _rate(rates.disk_bytes_per_s) + ", past the page cache")
    if rates.h2d_bytes_per_s is not None:
        yield _row("to, from the GPU", f"{_rate(rates.h2d_bytes_per_s)}, {_rate(rates.d2h_bytes_per_s)}")
    yield _row("float32, bfloat16", f"{rates.float32_flops / 1e9:.0f}, {rates.bfloat16_flops / 1e9:.0f} GFLOP/s")
    yield from _model(sizes, found)
    yield "Missing" if problems else "Nothing is missing."
    for problem in problems:
        yield f"  {problem.what}\n    -> {problem.fix}"
    yield "Start with"
    yield f"  {command}"


def _model(sizes: Sizes, found: Fit) -> Iterator[str]:
    yield "Model"
    yield _row("dense weights", _gb(sizes.dense_bytes))
    count = f"{sizes.num_layers} x {sizes.num_experts} of {_gb(sizes.expert_bytes)}, {sizes.top_k} per token"
    yield _row("experts", f"{_gb(sizes.all_experts_bytes)}: {count}")
    yield _row("experts in memory", "all" if found.all_experts_fit else f"{found.cached_frac:.0%}")
    fits = "fits" if found.context_fits else "does not fit: give --max-model-len"
    whole = _gb(sizes.kv_bytes_per_token * sizes.context)
    yield _row("context", f"{sizes.context} tokens, {whole} of keys and values: {fits}")
    if sizes.state_bytes_per_sequence:
        yield _row("recurrent layers", f"{_gb(sizes.state_bytes_per_sequence)} of state for each of --max-num-seqs")
    yield _row(
        "one stream", f"about {found.memory_bound_tokens_per_s:.1f} tokens/s at most, reading every weight from memory"
    )
    if not found.all_experts_fit and found.tokens_per_s is not None:
        yield _row("", f"about {found.tokens_per_s:.2f} tokens/s if all experts were used equally often; a cache gains")


def _row(name: str, text: str) -> str:
    return f"  {name:<20}{text}"


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def _rate(bytes_per_s: float | None) -> str:
    return "not measured" if bytes_per_s is None else _gb(bytes_per_s) + "/s"
