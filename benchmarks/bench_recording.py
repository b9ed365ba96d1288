"""What recording the routing costs: the same decoding with the recorder on and off, alternating step by step.

    python benchmarks/bench_recording.py [MODEL] --batch 8 --settings '{"moe_cache_mib": 64}'

One process and one batch of sequences that does not end while it is measured; every step switches the recorder, and
the medians of both kinds are compared, so that neither drift nor outliers of a busy machine count. CPU time of all
threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import fix_environment, hardware, median, versions


def main() -> None:
    args = parse()
    fix_environment(args.threads)
    from moe_serve import LLM
    from moe_serve.cli.flags import default_model
    from moe_serve.expert_routes.route_recorder import RouteRecorder

    length = 2 * args.steps + 128
    llm = LLM(
        args.model or default_model(), num_threads=args.threads, max_model_len=length, max_num_seqs=args.batch,
        **json.loads(args.settings),
    )  # fmt: skip
    recorder = RouteRecorder(llm.engine.routing_shape(), 65536, weights=args.weights)
    start_requests(llm, args.batch, length)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for i in range(2 * args.steps):
        wanted = i % 2 == 1
        llm.engine.observe_routes(recorder, wanted)
        seconds[wanted].append(step_s(llm))
    off, on = median(seconds[False]), median(seconds[True])
    print(f"batch {args.batch}: a step takes {1000 * off:.2f} ms, with the recorder {1000 * on:.2f} ms: {on / off:.4f}")
    facts = {"hardware": hardware(), "versions": versions(), "batch": args.batch, "settings": args.settings}
    print(
        json.dumps(
            {"ratio": on / off, "off_ms": 1000 * off, "on_ms": 1000 * on, "recorded": recorder.num_recorded, **facts}
        )
    )


def start_requests(llm: Any, batch: int, length: int) -> None:
    """Sequences that go on for as long as the context, and their prompts computed."""
    from moe_serve import SamplingParams
    from moe_serve.scheduling.sequence import Request

    params = SamplingParams(temperature=0, max_tokens=length - 32, ignore_eos=True)
    for i in range(batch):
        prompt = tuple(3 + (37 * i + 11 * j) % 4000 for j in range(32))
        llm.engine.add_request(Request(f"r{i}", prompt, params))
    for _ in range(8):
        llm.engine.step()


def step_s(llm: Any) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    llm.engine.step()
    return time.process_time() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="FOLDER", help="default: the demo model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400, help="of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", action="store_true", help="record the routers' weights too")
    parser.add_argument("--settings", default="{}", help="more EngineConfig fields, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
