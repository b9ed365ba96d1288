"""Perplexity of the demo model on held-out text, its experts in bf16 and quantised.

    PYTHONPATH=. python benchmarks/bench_quantized.py --data DATA --out quantized.json

Every format is made by `moe-serve quantize` (fp8: here, e4m3 with a scale per row) and read back from its codes;
what the codes stand for goes into one and the same torch model, whose other weights stay as they are. Calibration
text is text the model was trained on, never held-out text. Beside perplexity stands the mean Kullback-Leibler
divergence of the next token's distribution from the bf16 model's, which luck on single tokens does not blur. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from examples.train_demo.data import Corpus, read_corpus
from examples.train_demo.evaluate import load_model, windows
from expert_cache.storage.store import matrices_of
from moe_serve.cli import main as moe_serve
from moe_serve.cli.flags import default_model
from moe_serve.hf.checkpoint import open_all_experts
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from predictors.shape import MoELayer

Decode = Callable[[MoELayer, int], tuple[torch.Tensor, ...]]
"""(layer, expert) -> gate, up, down in float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="See examples/train_demo/README.md.")
    parser.add_argument("--tokens", type=int, default=20_000, help="Held-out tokens to score, from all books alike.")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, corpus = load_model(Path(default_model())), read_corpus(args.data)
    streams = _held_out(corpus, args.tokens)
    rows: list[dict[str, Any]] = []
    originals: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration.txt"
        calibration.write_text(_calibration(corpus, args.calibration_tokens), encoding="utf-8")
        for name, expert_bytes, decode in _formats(Path(folder), calibration, args.calibration_tokens):
            _set_experts(model, decode)
            nats, kl = _scores(model, streams, originals)
            rows.append({"format": name, "expert_bytes": expert_bytes, "perplexity": math.exp(nats), "kl_nats": kl})
            base = rows[0]["perplexity"]
            print(
                f"{name:14} {expert_bytes:8} bytes per expert, perplexity {math.exp(nats):8.4f}"
                f" ({100 * (math.exp(nats) / base - 1):+.3f} %), KL {1000 * kl:.3f} millinats",
                flush=True,
            )
    result = {"tokens": sum(len(ids) - 1 for ids in streams), "torch": torch.__version__, "formats": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def _held_out(corpus: Corpus, most_tokens: int) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    share = most_tokens // len(corpus.books)
    texts = [tokenizer(book.held_out)["input_ids"][:share] for book in corpus.books]
    return [torch.tensor([tokenizer.bos_token_id, *ids]) for ids in texts]


def _calibration(corpus: Corpus, tokens: int) -> str:
    """From the middle of every book alike; a token of this vocabulary is some four characters."""
    share = 5 * tokens // len(corpus.books)
    return "".join(book.train[len(book.train) // 2 :][:share] for book in corpus.books)


@torch.no_grad()
def _scores(model: Any, streams: list[torch.Tensor], originals: list[torch.Tensor]) -> tuple[float, float]:
    """Mean loss in nats, and mean divergence from what the first model predicted, which is noted in `originals`."""
    first, nats, divergence, count = not originals, 0.0, 0.0, 0
    pieces = [piece for ids in streams for piece in windows(ids, 1024, 512)]
    for i, (window, new) in enumerate(pieces):
        logs = model(window[None, :-1], use_cache=False).logits[0, -new:].log_softmax(-1)
        if first:
            originals.append(logs.half())
        before = originals[i].float()
        nats -= float(logs.gather(1, window[-new:, None]).sum())
        divergence += float((before.exp() * (before - logs)).sum())
        count += new
    return nats / count, divergence / count


def _formats(folder: Path, calibration: Path, tokens: int) -> Iterator[tuple[str, int, Decode]]:
    """(name, bytes of an expert, decoder), bf16 first."""
    original = open_all_experts(default_model())

    def fp8(layer: MoELayer, expert: int) -> tuple[torch.Tensor, ...]:
        return tuple(_through_fp8(m) for m in _floats(original)(layer, expert))

    rows = sum(m.shape[0] for m in matrices_of(original.weights(original.layers[0], 0)))
    yield "bf16", original.expert_bytes, _floats(original)
    yield "fp8", original.expert_bytes // 2 + 4 * rows, fp8
    searched = ["--calibration", str(calibration), "--calibration-tokens", str(tokens)]
    for name, flags in {
        "int8": ["--bits", "8"],
        "int4": ["--bits", "4"],
        "int4+search": ["--bits", "4", *searched],
        "int4 g32": ["--bits", "4", "--group-size", "32"],
        "int4 g32+search": ["--bits", "4", "--group-size", "32", *searched],
    }.items():
        target = folder / name.replace(" ", "-")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = moe_serve(["quantize", default_model(), "-o", str(target), *flags])
        assert status == 0, name
        store = open_all_experts(str(target))
        yield name, store.expert_bytes, _floats(store)


def _floats(store: Any) -> Decode:
    return lambda layer, expert: tuple(as_tensor(m, torch.float32) for m in matrices_of(store.weights(layer, expert)))


def _through_fp8(matrix: torch.Tensor) -> torch.Tensor:
    scale = matrix.abs().amax(1, keepdim=True) / 448
    return (matrix / scale).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def _set_experts(model: Any, decode: Decode) -> None:
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for expert in range(experts.gate_up_proj.shape[0]):
            gate, up, down = decode(MoELayer(index), expert)
            experts.gate_up_proj[expert].copy_(torch.cat([gate, up]))
            experts.down_proj[expert].copy_(down)


if __name__ == "__main__":
    main()
