"""What recording the routing costs: the same decoding with the recorder on and off, alternating every few steps.

    python benchmarks/bench_recording.py [MODEL] --batch 8 --settings '{"moe_cache_mib": 64}'

One process, one batch of sequences that never ends while it is measured; every block of steps switches the recorder.
A ratio of two neighbouring blocks does not see the load of the machine drift. The last line is JSON.
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
    from moe_serve.route_recorder import RouteRecorder

    length = 64 + args.blocks * 2 * args.steps + 64
    llm = LLM(
        args.model or default_model(), num_threads=args.threads, max_model_len=length, max_num_seqs=args.batch,
        **json.loads(args.settings),
    )  # fmt: skip
    recorder = RouteRecorder(llm.engine.routing_shape(), 65536, weights=args.weights)
    start_requests(llm, args.batch, length)
    ratios = []
    for _ in range(args.blocks):
        seconds = {}
        for wanted in (False, True):
            llm.engine.listen_to_routes(recorder, wanted)
            seconds[wanted] = run_steps(llm, args.steps)
        ratios.append(seconds[True] / seconds[False])
    slower = median(ratios)
    print(
        f"batch {args.batch}: with the recorder a step takes {slower:.4f} of the time without (median of {len(ratios)})"
    )
    facts = {"hardware": hardware(), "versions": versions(), "batch": args.batch, "settings": args.settings}
    print(json.dumps({"ratio": slower, "ratios": ratios, "recorded": recorder.num_recorded, **facts}))


def start_requests(llm: Any, batch: int, length: int) -> None:
    """Sequences that go on for as long as the context, and their prompts computed."""
    from moe_serve import SamplingParams
    from moe_serve.sequence import Request

    params = SamplingParams(temperature=0, max_tokens=length - 32, ignore_eos=True)
    for i in range(batch):
        prompt = tuple(3 + (37 * i + 11 * j) % 4000 for j in range(32))
        llm.engine.add_request(Request(f"r{i}", prompt, params))
    for _ in range(8):
        llm.engine.step()


def run_steps(llm: Any, count: int) -> float:
    """CPU seconds of all threads: other processes on the machine do not count."""
    start = time.process_time()
    for _ in range(count):
        llm.engine.step()
    return time.process_time() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="FOLDER", help="default: the demo model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of one block")
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", action="store_true", help="record the routers' weights too")
    parser.add_argument("--settings", default="{}", help="more EngineConfig fields, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
