"""What loading costs: anonymous memory and time for a 1.4 GB random Mixtral, ours and transformers'.

    python benchmarks/bench_load.py [--size mixtral-1.4g] [--folder /tmp/moe-serve-bench]

Every load runs in a process of its own. The process imports everything first, then waits; its
parent samples RssAnon (memory no file stands behind) from the word "go" until the model is
loaded. Passed: ours grows by at most the dense weights, counted in the compute dtype, + 100 MB.
KV pages are left out (one page); experts are built into compute-ready form by the first requests,
within --moe-cache-mib, and are not part of loading. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import fix_environment, hardware, rss_mb, versions

ALLOWANCE_MB = 100.0
SAMPLE_S = 0.004
SIDES = ("moe_serve", "transformers")
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Load:
    """One load: all memory in MB of RssAnon above what the process had before."""

    side: str
    dtype: str
    before_mb: float
    """RssAnon after the imports, in absolute terms."""
    grown_mb: float
    peak_mb: float
    seconds: float


# ---- the child: one load ---------------------------------------------------------------------------


def child(side: str, folder: str, dtype: str) -> None:
    """Import, say so, wait for a line on stdin, load, say so, and stay until stdin ends."""
    load = {"moe_serve": _load_ours, "transformers": _load_theirs}[side](folder, dtype)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    model = load()
    print(time.perf_counter() - start, flush=True)
    sys.stdin.readline()
    del model


def _load_ours(folder: str, dtype: str) -> Any:
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401 - transformers imports it when loading

    from moe_serve.config import EngineConfig
    from moe_serve.engine.engine import Engine

    config = EngineConfig.of(model=folder, dtype=dtype, num_threads=1, num_kv_pages=1, max_num_batched_tokens=16)
    return lambda: Engine.from_config(config)


def _load_theirs(folder: str, dtype: str) -> Any:
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

    return lambda: MixtralForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


# ---- the parent: watch it ------------------------------------------------------------------------------


class PeakSampler(threading.Thread):
    """Largest RssAnon of a process while this thread runs, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_mb = max(self.peak_mb, rss_mb(self._pid)["RssAnon"])

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.peak_mb


def measure(side: str, folder: Path, dtype: str) -> Load:
    """Load in a fresh process and watch its memory."""
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder), "--dtype", dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        _expect(process.stdout.readline(), "ready", side)
        before = rss_mb(process.pid)["RssAnon"]
        sampler = PeakSampler(process.pid)
        sampler.start()
        print("go", file=process.stdin, flush=True)
        line = process.stdout.readline()
        after, peak = rss_mb(process.pid)["RssAnon"], sampler.stop()
        process.stdin.close()
    return Load(side, dtype, before, after - before, max(peak, after) - before, float(line))


def _expect(line: str, wanted: str, side: str) -> None:
    if line.strip() != wanted:
        raise RuntimeError(f"the {side} process said {line!r} instead of {wanted!r}; its error is above")


def dense_mb(folder: Path, itemsize: int) -> float:
    """MB of all tensors that belong to no expert, with `itemsize` bytes per element."""
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
                if ".experts." not in name:
                    rows = handle.get_slice(name).get_shape()
                    count += rows[0] * (rows[1] if len(rows) > 1 else 1)
    return count * itemsize / 1e6


def report(folder: Path, loads: list[Load]) -> dict[str, Any]:
    """The JSON line: every load with the limit that holds for ours."""
    rows = []
    for load in loads:
        dense = dense_mb(folder, 2 if load.dtype == "bfloat16" else 4)
        within = {"grown_ok": load.grown_mb <= dense + ALLOWANCE_MB, "peak_ok": load.peak_mb <= dense + ALLOWANCE_MB}
        rows.append({**_rounded(asdict(load)), "dense_mb": round(dense, 1), **within})
    total = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return {
        "benchmark": "load",
        "passed": all(r["grown_ok"] for r in rows if r["side"] == "moe_serve"),
        "allowance_mb": ALLOWANCE_MB,
        "checkpoint_mb": round(total / 1e6, 1),
        "loads": rows,
        "versions": versions(),
        "hardware": hardware(),
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in values.items()}


def print_table(result: dict[str, Any]) -> None:
    print(f"{'side':14}{'dtype':10}{'dense MB':>10}{'grown MB':>10}{'peak MB':>10}{'seconds':>9}")
    for r in result["loads"]:
        row = f"{r['side']:14}{r['dtype']:10}{r['dense_mb']:10.1f}{r['grown_mb']:10.1f}"
        print(f"{row}{r['peak_mb']:10.1f}{r['seconds']:9.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mixtral-1.4g", help="see make_checkpoint.py")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/moe-serve-bench"))
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype; default: one after the other")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    fix_environment(threads=1)
    if args.child:
        child(args.child, str(args.folder), args.dtype)
        return 0
    from make_checkpoint import make_checkpoint

    folder = make_checkpoint(args.size, args.folder / args.size)
    dtypes = [args.dtype] if args.dtype else list(DTYPES)
    result = report(folder, [measure(side, folder, dtype) for dtype in dtypes for side in SIDES])
    print_table(result)
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
