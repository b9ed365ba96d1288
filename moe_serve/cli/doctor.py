"""`moe-serve doctor [MODEL]`: what this machine can do, what fits, what is missing, and how to start.

Before a download, too: of a model id, a URL or a config.json, sizes are known without the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_serve.cli.flags import add_hub_flags, add_model_argument, default_model
from moe_serve.cli.subject import Subject, subject_of
from moe_serve.config.model_folder import cache_folder
from moe_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from moe_serve.doctor.findings import Finding, Hardware
    from moe_serve.doctor.fit import Fit, Sizes
    from moe_serve.doctor.rates import Rates

HELP = (
    "Measure this machine and say what of a model fits, what is missing, and how to serve it."
    " Nothing is downloaded: MODEL may also be a URL or a config.json."
)


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_hub_flags(parser)
    parser.add_argument(
        "--moe-expert-file", metavar="FILE", type=Path, help="Experts are read from there (made by `moe-serve pack`)."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead.")


def run(args: argparse.Namespace) -> int:
    """Status 1 if something was found with which serving would fail."""
    with subject_of(args.model, getattr(args, "revision", None), getattr(args, "offline", False)) as subject:
        return _examine(args, subject)


def _examine(args: argparse.Namespace, subject: Subject) -> int:
    expert_file = _expert_file(args)
    import torch

    from moe_serve import resolve
    from moe_serve.config import EngineConfig
    from moe_serve.doctor import findings, fit, rates
    from moe_serve.hf.config_file import read_config
    from moe_serve.memory import free_bytes
    from moe_serve.spec import ModelSpec

    config = EngineConfig(model=subject.folder)
    device = resolve.device_of(config)
    dtype = resolve.dtype_of(config, ModelSpec.from_hf(read_config(subject.folder)), device)
    machine, problems = findings.hardware(), findings.findings()
    sizes = _sizes(subject, dtype, device, expert_file)
    num_threads = resolve.num_threads_of(config)
    with _disk_files(subject, expert_file) as files:
        measured = rates.measure(files, num_threads, device)
    found = fit.fit(sizes, measured, free_bytes(torch.device(device)), device.type == "cpu")
    if not found.dense_fits:
        what = f"the dense weights alone take {_gb(sizes.dense_bytes)}, more than is free"
        problems.append(findings.Finding(what, "a machine or a container with more memory", is_error=True))
    problems += _downloads(subject)
    command = command_line(subject.name, found, expert_file)
    if args.json:
        parts: dict[str, Any] = {"hardware": machine, "rates": measured, "sizes": sizes, "fit": found}
        shown = {name: dataclasses.asdict(part) for name, part in parts.items()}
        more = {"known": subject.known, "download_bytes": subject.download_bytes, "command": command}
        print(json.dumps({**shown, "findings": [dataclasses.asdict(p) for p in problems], **more}))
    else:
        print("\n".join(_report(machine, measured, subject, sizes, found, problems, command)))
    return int(any(p.is_error for p in problems))


def _sizes(subject: Subject, dtype: torch.dtype, device: torch.device, expert_file: str | None) -> Sizes:
    """From the files, or from the config where there are none."""
    from moe_serve.doctor import fit, from_config

    if subject.known != "config":
        return fit.sizes_of(subject.folder, dtype, device, expert_file)
    if expert_file is not None:
        raise ConfigError("--moe-expert-file: there are no weights that the file could have been made from")
    return from_config.sizes_from_config(subject.folder, dtype)


def _disk_files(subject: Subject, expert_file: str | None) -> AbstractContextManager[list[Path]]:
    """What to measure the disk with: the experts' files, or one where a download would go."""
    from moe_serve.doctor import rates
    from moe_serve.hf.checkpoint import weight_files

    if subject.known == "all":
        return nullcontext([Path(file) for file in ([expert_file] if expert_file else weight_files(subject.folder))])
    return rates.scratch_file(cache_folder(os.environ))


def _downloads(subject: Subject) -> Iterator[Finding]:
    """Where the weights have no room."""
    from moe_serve.doctor.findings import Finding
    from moe_serve.doctor.rates import existing

    folder = cache_folder(os.environ)
    free = shutil.disk_usage(existing(folder)).free
    if subject.download_bytes > free:
        what = f"the download takes {_gb(subject.download_bytes)}, but only {_gb(free)} are free in {folder}"
        yield Finding(what, "set HF_HUB_CACHE to a folder on a larger disk", is_error=True)


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
    machine: Hardware,
    rates: Rates,
    subject: Subject,
    sizes: Sizes,
    found: Fit,
    problems: Sequence[Finding],
    command: str,
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
    yield "Model"
    yield from _source(subject)
    yield from _model(sizes, found)
    yield "Missing" if problems else "Nothing is missing."
    for problem in problems:
        yield f"  {problem.what}\n    -> {problem.fix}"
    yield "Start with"
    yield f"  {command}"


def _source(subject: Subject) -> Iterator[str]:
    if subject.known == "headers":
        yield _row("download", f"{_gb(subject.download_bytes)}; the sizes below are from the files' headers")
    elif subject.known == "config":
        indexed = subject.indexed_bytes
        yield _row("sizes", "from config.json alone" + (f"; the index says {_gb(indexed)} in all" if indexed else ""))


def _model(sizes: Sizes, found: Fit) -> Iterator[str]:
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
