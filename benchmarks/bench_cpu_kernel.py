"""One MoE layer on the CPU: our kernel beside every torch path and, where a ggml is given, llama.cpp's.

    python benchmarks/bench_cpu_kernel.py --threads 1 [--ggml GGML_SOURCES GGML_BUILD] [--shapes M1 M2]

Shapes M1 (8 experts of 1024 x 3584, 2 per token) and M2 (64 of 512 x 256, 8 per token), as in Mixtral and in
Qwen3-30B-A3B, scaled down. All sides run on the same random weights and routing, in turn, in one process; the
least time of a side counts, and ratios. A turn is up to eight layers in a row of several that are together larger
than the caches, so weights come from memory. What a time includes: grouping tokens by expert, gate, up, SwiGLU, down;
ours the weighted sum too.

torch's sides compute in bf16 (rows: F.linear per expert; grouped: grouped_mm; packed: oneDNN, weights packed ahead of
time, a second copy of them) or in float32 on a packed float32 copy (packed32). ggml rounds activations to eight bits
for Q8_0 and Q4_K; ours never. The floor is the time to read the weights of the experts in use at the fastest rate
seen in this run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, versions

from moe_serve.openmp import spin_briefly

SHAPES = {"M1": (1024, 3584, 8, 2), "M2": (512, 256, 64, 8)}
LEAST_BYTES = 160 << 20
"""Of a format's weights over all layers that take turns: several times the last-level cache."""
LAYERS_PER_TURN = 8
"""One after the other, as in a model: alone, a short layer would only show how long code takes to come back into the
caches after another side's turn."""
GGML_TYPES = {"bf16": 0, "int8": 1, "int4": 2}
Run = Callable[[int], None]
"""Runs the layer of that number."""


@dataclass
class Routing:
    x: Any
    """[T, H] float32."""
    ids: Any
    """[T, K] int64."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ggml", type=Path, nargs=2, metavar=("SOURCES", "BUILD"))
    parser.add_argument("--no-torch", action="store_true")
    args = parser.parse_args()
    fix_environment(args.threads)
    del os.environ["OMP_WAIT_POLICY"]
    spin_briefly(os.environ)  # as `moe-serve serve` does; for torch too, which gains by it
    import torch

    torch.set_num_threads(args.threads)
    ggml = _load_ggml(*args.ggml) if args.ggml else None
    rows = []
    for name in args.shapes:
        rows += _bench_shape(name, args, ggml)
    result = {"threads": args.threads, "rows": rows, "hardware": hardware(), "versions": versions()}
    print(json.dumps(result))
    return 0


def _bench_shape(name: str, args: Any, ggml: Any) -> list[dict[str, Any]]:
    import torch

    hidden, inner, experts, choices = SHAPES[name]
    sides: dict[str, tuple[Callable[[Routing], Run], int, float]] = {}
    for form in GGML_TYPES:
        ours, count, expert_bytes = _our_layers(form, hidden, inner, experts)
        sides[f"ours {form}"] = (ours, count, expert_bytes)
        if ggml is not None:
            sides[f"ggml {form}"] = (_ggml_layers(ggml, form, hidden, inner, experts, count, args.threads), count, 0)
    if not args.no_torch:
        sides |= {n: (make, 2, 0) for n, make in _torch_layers(hidden, inner, experts).items()}
    rows = []
    for tokens in args.tokens:
        torch.manual_seed(tokens)
        ids = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])
        routing = Routing(torch.randn(tokens, hidden), ids)
        used = ids.unique().numel()
        readers, read_bytes = _readers()
        runs = {n: (make(routing), count) for n, (make, count, _) in sides.items()}
        best = _interleaved({**runs, **readers}, args.rounds, args.threads)
        rate = read_bytes / min(best.pop(n) for n in readers) / 1e9
        rows.append({"shape": name, "tokens": tokens, "read_gb_s": rate, "ms": {n: 1e3 * s for n, s in best.items()}})
        rows[-1]["floor_frac"] = {
            n: used * expert_bytes / rate / 1e9 / best[n] for n, (_, _, expert_bytes) in sides.items() if expert_bytes
        }
        _print_row(rows[-1])
    return rows


def _print_row(row: dict[str, Any]) -> None:
    ms = row["ms"]
    print(f"{row['shape']} T={row['tokens']}")
    for form in GGML_TYPES:
        ours = ms[f"ours {form}"]
        peers = [n for n in ms if n == f"ggml {form}" or (form == "bf16" and not n.startswith(("ours", "ggml")))]
        ratios = "  ".join(f"{n} {ms[n] / ours:.2f}" for n in peers)
        floor = row["floor_frac"][f"ours {form}"]
        print(f"  {form}: {ours:8.3f} ms, {floor:.2f} of the floor; times ours: {ratios}", flush=True)


def _interleaved(sides: dict[str, tuple[Run, int]], rounds: int, threads: int) -> dict[str, float]:
    """Least seconds of each side; of one thread its own CPU time, so that being preempted does not count."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(sides, float("inf"))
    for i in range(rounds + 1):
        for name, (run, count) in sides.items():
            turn = min(count, LAYERS_PER_TURN)
            start = clock()
            for layer in range(i * turn, (i + 1) * turn):
                run(layer % count)
            if i:  # the first turn builds graphs and touches pages
                best[name] = min(best[name], (clock() - start) / turn)
    return best


def _readers() -> tuple[dict[str, tuple[Run, int]], int]:
    """Plain reads of memory that no cache holds, as further sides, and the bytes of each."""
    import torch

    data = torch.ones(64 << 20)
    reads: dict[str, Callable[[], Any]] = {"sum": data.sum, "max": data.max, "dot": lambda: torch.dot(data, data)}
    return {f"read {name}": (functools.partial(_read, read), 1) for name, read in reads.items()}, data.nbytes


def _read(read: Callable[[], Any], _: int) -> Any:
    return read()


def _matrices(seed: int, hidden: int, inner: int, experts: int) -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = ((experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner))
    gate, up, down = (torch.randn(s, generator=generator) / s[-1] ** 0.5 for s in shapes)
    return gate, up, down


def _our_layers(form: str, hidden: int, inner: int, experts: int) -> tuple[Callable[[Routing], Run], int, float]:
    """(maker of the side's run, layers that take turns, bytes of an expert)."""
    import torch

    from moe_serve_kernels.cpu.expert_layer import ExpertLayer
    from moe_serve_kernels.cpu.expert_mlp import Activation, MLPWeights

    def expert(matrices: Any, e: int) -> MLPWeights:
        return MLPWeights(*(_in_form(m[e], form) for m in matrices))

    def size(weights: MLPWeights) -> int:
        matrices: Any = (weights.gate, weights.up, weights.down)
        return sum(m.nbytes if isinstance(m, torch.Tensor) else sum(t.nbytes for t in m.tensors) for m in matrices)

    def layer(i: int) -> list[MLPWeights]:
        matrices = _matrices(i, hidden, inner, experts)
        return [expert(matrices, e) for e in range(experts)]

    layers = [layer(0)]
    count = max(2, -(-LEAST_BYTES // (size(layers[0][0]) * experts)))
    layers += [layer(i) for i in range(1, count)]
    in_place = [ExpertLayer(layer) for layer in layers]

    def make(routing: Routing) -> Run:
        weights = torch.full(routing.ids.shape, 1 / routing.ids.shape[1])

        def run(i: int) -> None:
            in_place[i].run(routing.x, routing.ids, weights, Activation("silu"))

        return run

    return make, count, size(layers[0][0])


def _in_form(matrix: Any, form: str) -> Any:
    import torch

    from moe_serve.quantization.rounding import round_matrix
    from moe_serve.quantization.writing import packed
    from moe_serve_kernels.quantized import QuantizedRows

    if form == "bf16":
        return matrix.to(torch.bfloat16)
    bits, group = (8, 0) if form == "int8" else (4, 128)
    tensors = packed(round_matrix(matrix, bits, group), bits)
    columns = matrix.shape[1]
    codes = tensors["weight_packed"].view(torch.uint8)
    return QuantizedRows(
        "uint8" if bits == 8 else "int4",
        codes,
        tensors["weight_scale"],
        columns,
        group or columns,
        zero=1 << (bits - 1),
    )


def _torch_layers(hidden: int, inner: int, experts: int) -> dict[str, Callable[[Routing], Run]]:
    """Maker of each side's run on two layers."""
    import torch
    from torch.nn import functional as F

    layers = [tuple(m.bfloat16() for m in _matrices(i, hidden, inner, experts)) for i in range(2)]
    pack = torch.ops.mkldnn._reorder_linear_weight

    def per_expert(linear: Callable[[Any, Any], Any], weights: Any, dtype: Any) -> Callable[[Routing], Run]:
        def make(routing: Routing) -> Run:
            x = routing.x.to(dtype)
            choices = routing.ids.shape[1]

            def run(i: int) -> None:
                flat = routing.ids.flatten()
                order = flat.argsort(stable=True)
                counts = torch.bincount(flat, minlength=experts).tolist()
                rows = x[order // choices]
                start = 0
                for e, count in enumerate(counts):
                    if count:
                        part = rows[start : start + count]
                        gate, up, down = weights[i][e]
                        linear(F.silu(linear(part, gate)) * linear(part, up), down)
                        start += count

            return run

        return make

    def grouped(routing: Routing) -> Run:
        x, choices = routing.x.bfloat16(), routing.ids.shape[1]
        stacked = [(torch.cat([g, u], 1).transpose(1, 2), d.transpose(1, 2)) for g, u, d in layers]

        def run(i: int) -> None:
            flat = routing.ids.flatten()
            order = flat.argsort(stable=True)
            ends = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
            gate, up = F.grouped_mm(x[order // choices], stacked[i][0], offs=ends).chunk(2, 1)
            F.grouped_mm(F.silu(gate) * up, stacked[i][1], offs=ends)

        return run

    def packed_linear(x: Any, weight: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    rows = [[(g[e], u[e], d[e]) for e in range(experts)] for g, u, d in layers]
    packed = [[tuple(pack(m.contiguous(), None) for m in expert) for expert in layer] for layer in rows]
    packed32 = [[tuple(pack(m.float().contiguous(), None) for m in expert) for expert in layer] for layer in rows]
    return {
        "rows": per_expert(F.linear, rows, torch.bfloat16),
        "grouped": grouped,
        "packed": per_expert(packed_linear, packed, torch.bfloat16),
        "packed32": per_expert(packed_linear, packed32, torch.float32),
    }


def _load_ggml(sources: Path, build: Path) -> Any:
    """Compile ggml_moe.cpp against it."""
    library = Path(tempfile.mkdtemp()) / "ggml_moe.so"
    libraries = [str(next(build.rglob(f"lib{name}.so"))) for name in ("ggml", "ggml-base", "ggml-cpu")]
    folders = sorted({str(Path(one).parent) for one in libraries})
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", str(Path(__file__).parent / "ggml_moe.cpp")]
    command += [f"-I{sources / 'include'}", *libraries, *(f"-Wl,-rpath,{folder}" for folder in folders)]
    subprocess.run([*command, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_moe_new.argtypes = [ctypes.c_int32, number, number, number, pointer, pointer, pointer]
    loaded.ggml_moe_new.restype = pointer
    loaded.ggml_moe_is_repacked.argtypes = [pointer]
    loaded.ggml_moe_run.argtypes = [pointer, pointer, pointer, number, number, ctypes.c_int32, pointer]
    loaded.ggml_moe_run.restype = None
    return loaded


def _ggml_layers(
    ggml: Any, form: str, hidden: int, inner: int, experts: int, count: int, threads: int
) -> Callable[[Routing], Run]:
    import torch

    handles = []
    for i in range(count):
        matrices = _matrices(i, hidden, inner, experts)
        handles.append(
            ggml.ggml_moe_new(GGML_TYPES[form], hidden, inner, experts, *(m.contiguous().data_ptr() for m in matrices))
        )
    print(f"ggml {form}: weights {'repacked' if ggml.ggml_moe_is_repacked(handles[0]) else 'as stored'}", flush=True)

    def make(routing: Routing) -> Run:
        tokens, choices = routing.ids.shape
        ids, x = routing.ids.to(torch.int32).contiguous(), routing.x.contiguous()

        def run(i: int) -> None:
            ggml.ggml_moe_run(handles[i], x.data_ptr(), ids.data_ptr(), tokens, choices, threads, None)

        return run

    return make


if __name__ == "__main__":
    sys.exit(main())
