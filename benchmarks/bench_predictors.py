"""Predictors on a real model: recall by layer, hidden states included, and what they cost beside its forward pass.

    python benchmarks/bench_predictors.py moe_serve/demo/model --text a.txt b.txt
    python benchmarks/bench_predictors.py FOLDER_OF_A_RANDOM_MIXTRAL --tokens 8000

Prompts, cut from the texts (or random token ids without any), run once through the engine while a tap beside the
experts keeps each layer's input, choices and weights. Every method learns from 80 % of the prompts and is judged on
the rest. Costs: the least time of one call for one row, beside the least of a decode step of one sequence, in turn
in one process; on a busy machine other statistics say who else was running.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
from measuring import fix_environment, hardware, versions

if TYPE_CHECKING:
    from moe_serve import LLM
    from moe_serve.engine.model_runner import ModelRunner
    from predictors.predictor import Predictor, Training
    from predictors.trace import RoutingTrace

DISTANCES = (1, 2, 3, 4, 0)


def main() -> int:
    args = parse()
    fix_environment(args.threads)
    from moe_serve import LLM

    llm = LLM(str(args.model), max_num_seqs=1, enable_prefix_caching=False, num_threads=args.threads)
    tap = Tap()
    with tap.on(llm):
        for prompt in prompts_of(llm, args):
            tap.sequence(llm, prompt)
    report = judge(llm, tap, args)
    print(json.dumps({"model": str(args.model), **report, "hardware": hardware(), "versions": versions()}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="FOLDER")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=["frequency", "transition", "next_gate", "pregate"])
    parser.add_argument("--decode-tokens", type=int, default=100, help="timed steps")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def prompts_of(llm: LLM, args: argparse.Namespace) -> Iterator[list[int]]:
    """Token ids of each prompt, evenly from the texts."""
    import numpy as np

    count = args.tokens // args.prompt_len
    if not args.text:
        vocabulary = llm.engine.spec.vocab_size
        # Words come in Zipf's frequencies; without repetition a token's own routes could not be learnt.
        ranks = np.random.default_rng(0).zipf(1.2, size=(count, args.prompt_len))
        yield from (ranks % vocabulary).tolist()
        return
    texts = [llm.tokenizer.encode(path.read_text(encoding="utf-8")[:2_000_000]) for path in args.text]
    for i in range(count):
        ids = texts[i % len(texts)]
        start = (i // len(texts)) * (len(ids) - args.prompt_len) // max(1, count // len(texts))
        yield list(ids[start : start + args.prompt_len])


def runner_of(llm: LLM) -> ModelRunner:
    """What runs the model of this process."""
    from moe_serve.engine.model_runner import ModelRunner

    assert isinstance(llm.engine.runner, ModelRunner)
    return llm.engine.runner


@dataclass
class Tap:
    """What went through the experts of every layer."""

    layers: dict[int, list[Any]] = field(default_factory=dict)
    """MoE layer -> (hidden [T, H], ids [T, K], weights [T, K]) of each call."""
    prompts: list[list[int]] = field(default_factory=list)

    @contextmanager
    def on(self, llm: LLM) -> Iterator[None]:
        experts: Any = runner_of(llm).experts
        run = experts.run

        def run_and_keep(layer: Any, hidden: Any, ids: Any, weights: Any, *rest: Any) -> Any:
            self.layers.setdefault(layer, []).append((hidden.float().numpy(), ids.numpy(), weights.float().numpy()))
            return run(layer, hidden, ids, weights, *rest)

        experts.run = run_and_keep
        try:
            yield
        finally:
            experts.run = run

    def sequence(self, llm: LLM, prompt: list[int]) -> None:
        from moe_serve import SamplingParams

        self.prompts.append(prompt)
        llm.generate([prompt], SamplingParams(max_tokens=1))

    def trace(self, layer_ids: tuple[int, ...], num_experts: int) -> tuple[RoutingTrace, Any]:
        """The routes, and hidden [N, L, H]."""
        import numpy as np

        from predictors.trace import RoutingTrace, offsets_of

        names = sorted(self.layers)
        hidden, ids, weights = (
            np.stack([np.concatenate([call[part] for call in self.layers[layer]]) for layer in names], axis=1)
            for part in range(3)
        )
        offsets = offsets_of([len(p) for p in self.prompts])
        tokens = np.concatenate([np.array(p) for p in self.prompts])
        ids_of_layers = np.array(layer_ids, np.int32)
        return RoutingTrace(ids, offsets, ids_of_layers, num_experts, weights, token_ids=tokens), hidden


def judge(llm: LLM, tap: Tap, args: argparse.Namespace) -> dict[str, Any]:
    from moe_serve.hf.routers import find_routers
    from predictors.evaluation import evaluate
    from predictors.methods import find_method
    from predictors.predictor import Training

    runner, spec = runner_of(llm), llm.engine.spec
    num_experts = spec.num_experts
    trace, hidden = tap.trace(runner.moe_layer_ids(), num_experts)
    last_train = round(0.8 * trace.num_sequences)
    cut = int(trace.seq_offsets[last_train])
    train, test = trace.head(cut), trace.select(list(range(last_train, trace.num_sequences)))
    training = Training(train, find_routers(runner.model, num_experts, spec.hidden_size))
    found: dict[str, Any] = {"tokens": trace.num_tokens, "methods": {}}
    print(f"{trace.num_tokens} tokens, {trace.num_layers} layers of {num_experts}, top-{trace.top_k}; recall %")
    for name in args.methods:
        predictor = find_method(name).fit(training)
        scores = evaluate(predictor, test, DISTANCES, hidden=hidden[cut:])
        by_distance = {str(d) if d else "before": scores.recall(d) for d in DISTANCES}
        by_layer = {str(d) if d else "before": scores.recall_by_layer(d) for d in DISTANCES}
        print(f"{name:12}", {d: f"{100 * r:.1f}" for d, r in by_distance.items()}, flush=True)
        for d, recalls in by_layer.items():
            print(f"    {d:>6}", " ".join("   - " if r is None else f"{100 * r:5.1f}" for r in recalls))
        cost = costs(llm, predictor, training, args)
        print(f"    cost, % of a forward pass: {100 * cost['step_frac']:.2f} to begin a token,", end=" ")
        print(f"{100 * cost['forecasts_frac']:.2f} to forecast every layer", flush=True)
        found["methods"][name] = {"recall": by_distance, "recall_by_layer": by_layer, **cost}
    return found


def costs(llm: LLM, predictor: Predictor, training: Training, args: argparse.Namespace) -> dict[str, float]:
    """Of one row: `step` and what a forecast of every layer takes, beside a decode step."""
    import numpy as np

    from moe_serve import SamplingParams

    streams, token = np.array([0]), np.array([5])
    trace = training.trace
    predictor.begin(streams)
    forwards: list[float] = []
    steps: list[float] = []
    forecasts: list[float] = []
    hidden = np.zeros((1, llm.engine.spec.hidden_size), dtype=np.float32)
    before = time.perf_counter()
    for n, _ in enumerate(llm.stream([1, 2, 3], SamplingParams(max_tokens=args.decode_tokens, ignore_eos=True))):
        forwards.append(time.perf_counter() - before)
        before = time.perf_counter()
        predictor.step(streams, token)
        steps.append(time.perf_counter() - before)
        before = time.perf_counter()
        for layer in range(trace.num_layers):
            predictor.probabilities(layer, streams)
        forecasts.append(time.perf_counter() - before)
        for layer in range(trace.num_layers):
            predictor.observe(layer, streams, trace.ids[n : n + 1, layer].astype(np.int32), None, hidden)
        before = time.perf_counter()
    return {
        "forward_s": min(forwards),
        "step_s": min(steps),
        "forecasts_s": min(forecasts),
        "step_frac": min(steps) / min(forwards),
        "forecasts_frac": min(forecasts) / min(forwards),
    }


if __name__ == "__main__":
    raise SystemExit(main())
