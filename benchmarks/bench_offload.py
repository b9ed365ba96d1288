"""A model bigger than its memory: moe-serve's offload mode beside llama.cpp and accelerate.

    python benchmarks/make_checkpoint.py mixtral-4g /tmp/m4g
    python benchmarks/bench_offload.py /tmp/m4g --cache-frac 0.25 --rounds 3 \\
        [--gguf FILE --llama-completion BINARY] [--accelerate-python PYTHON]

Every side decodes the same prompt, greedily, batch 1, as a fresh process under the same memory limit
(a cgroup's, page cache included), files cold, sides interleaved round by round. For moe-serve the
physical limit is stated too: missed bytes over the disk's rate, measured by the same reading path in
the same process (offload_decode.py). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import hardware, median, versions
from memory_limit import run_limited
from offload_peers import SideResult, run_accelerate, run_llama_cpp

RUNTIME_BYTES = 500_000_000
"""Python, torch and transformers themselves."""
SLACK_FRAC = 0.1
OURS = Path(__file__).with_name("offload_decode.py")


def main() -> int:
    args = parse()
    sides = sides_of(args)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, run in sides.items():
            row = run()
            rows[name].append(row)
            print(f"round {number + 1} {name}: {describe(row)}", flush=True)
    report = {"hardware": hardware(), "versions": versions(), "limit_mb": limit_bytes(args) / 1e6, "sides": rows}
    summary = {name: median([row["tokens_per_s"] for row in rows[name]]) for name in sides}
    ours = [name for name in sides if name.startswith("moe-serve")]
    print_table(rows, summary, ours)
    print(json.dumps({"median_tokens_per_s": summary, **report}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="FOLDER")
    parser.add_argument("--cache-frac", type=float, default=0.25, help="of the experts that fit the cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--num-tokens", type=int, default=33)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--expert-file", type=Path, help="made by `moe-serve pack`: one more side")
    parser.add_argument("--variants", default="", help="more of our sides: NAME=SETTING:VALUE[,...];...")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-completion", type=Path, metavar="BINARY")
    parser.add_argument("--llama-tokens", type=int, default=9)
    parser.add_argument("--accelerate-python", type=Path, help="one that can import accelerate")
    parser.add_argument("--accelerate-tokens", type=int, default=5)
    return parser.parse_args()


def sizes(model: Path) -> dict[str, int]:
    """Bytes of a Mixtral checkpoint's experts, and of the rest in float32."""
    config = json.loads((model / "config.json").read_text())
    shape = config["hidden_size"] * config["intermediate_size"]
    count = config["num_hidden_layers"] * config["num_local_experts"]
    total = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    return {"expert": 3 * shape * 2, "experts": count, "dense": 2 * (total - count * 3 * shape * 2)}


def cache_mib(args: argparse.Namespace) -> int:
    size = sizes(args.model)
    # A slot is up to two blocks larger than its expert.
    return -(-int(size["experts"] * args.cache_frac) * (size["expert"] + 8192) // (1 << 20))


def limit_bytes(args: argparse.Namespace) -> int:
    """The same for all: our cache, the dense part, the runtime, and a tenth more."""
    return int((cache_mib(args) * (1 << 20) + sizes(args.model)["dense"] + RUNTIME_BYTES) * (1 + SLACK_FRAC))


def sides_of(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    prompt = [3 + 37 * i % (vocab - 3) for i in range(args.prompt_len)]
    limit = limit_bytes(args)
    budget = {"moe_cache_mib": cache_mib(args)}
    sides: dict[str, Callable[[], dict[str, Any]]] = {"moe-serve": lambda: run_ours(args, prompt, limit, budget)}
    for name, settings in variants(args).items():
        sides[f"moe-serve {name}"] = lambda s=settings: run_ours(args, prompt, limit, budget | s)  # type: ignore[misc]
    if args.llama_completion:
        sides["llama.cpp"] = lambda: peer(
            run_llama_cpp(args.gguf, prompt, args.llama_tokens, limit, args.llama_completion, args.threads)
        )
    if args.accelerate_python:
        sides["accelerate"] = lambda: peer(
            run_accelerate(args.model, prompt, args.accelerate_tokens, limit, args.accelerate_python, args.threads)
        )
    return sides


def variants(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Our other sides by name."""
    found: dict[str, dict[str, Any]] = {}
    if args.expert_file:
        found["packed"] = {"moe_expert_file": str(args.expert_file)}
    for item in filter(None, args.variants.split(";")):
        name, settings = item.split("=")
        found[name] = dict(pair.split(":") for pair in settings.split(","))
    return found


def run_ours(args: argparse.Namespace, prompt: list[int], limit: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One row: speed, the physical limit, and memory beside what it ought to be."""
    job = {"prompt_ids": prompt, "num_tokens": args.num_tokens, "threads": args.threads, "settings": settings}
    command = [sys.executable, str(OURS), str(args.model), json.dumps(job)]
    cold = [*args.model.glob("*.safetensors"), *([args.expert_file] if args.expert_file else [])]
    run = run_limited(command, limit, cold_files=cold)
    if run.returncode:
        raise RuntimeError(f"moe-serve returned {run.returncode}:\n{run.stderr[-3000:]}")
    said: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    tokens_per_s = (len(said["tokens"]) - 1) / said["decode_s"]
    rate = sum(said["rates"]) / len(said["rates"])
    formula = (len(said["tokens"]) - 1) * rate / said["missed_bytes"]
    planned = said["budget_mb"] + said["dense_mb"] + said["kv_mb"]
    return said | {
        "tokens_per_s": tokens_per_s,
        "formula_tokens_per_s": formula,
        "of_formula": tokens_per_s / formula,
        "planned_mb": planned,
        "peak_rss_mb": run.peak_rss_bytes / 1e6,
        "peak_anon_mb": run.peak_anon_bytes / 1e6,
        "peak_charged_mb": run.peak_cgroup_bytes / 1e6,
        "memory_ratio": (run.peak_rss_bytes / 1e6 - said["runtime_mb"]["VmHWM"]) / planned,
    }


def peer(result: SideResult) -> dict[str, Any]:
    row = asdict(result)
    return row | {
        "tokens": list(result.tokens),
        "tokens_per_s": result.tokens_per_s,
        "peak_rss_mb": result.peak_rss_bytes / 1e6,
        "peak_anon_mb": result.peak_anon_bytes / 1e6,
        "peak_charged_mb": result.peak_cgroup_bytes / 1e6,
    }


def describe(row: dict[str, Any]) -> str:
    text = f"{row['tokens_per_s']:.3f} tokens/s, peak RSS {row['peak_rss_mb']:.0f} MB"
    if "formula_tokens_per_s" not in row:
        return text
    rates = "/".join(f"{r / 1e6:.0f}" for r in row["rates"])
    return (
        f"{text} ({row['memory_ratio']:.2f} of budget + dense + KV, runtime apart), hits {row['hit_frac']:.3f},"
        f" disk {rates} MB/s, limit {row['formula_tokens_per_s']:.3f} tokens/s: {row['of_formula']:.3f} of it"
    )


def print_table(rows: dict[str, list[dict[str, Any]]], summary: dict[str, float], ours: list[str]) -> None:
    print("\n| side | tokens/s (median) | moe-serve is | peak RSS MB | of the physical limit |")
    print("|---|---|---|---|---|")
    for name, speed in summary.items():
        ratio = "" if name == ours[0] else f"{summary[ours[0]] / speed:.2f}x"
        limit = f"{median([r['of_formula'] for r in rows[name]]):.3f}" if name in ours else ""
        peak = max(row["peak_rss_mb"] for row in rows[name])
        print(f"| {name} | {speed:.3f} | {ratio} | {peak:.0f} | {limit} |")


if __name__ == "__main__":
    sys.exit(main())
