"""Serve a model whose experts do not all fit: give them a few MiB, and see what that cost and what it did not change.

.venv/bin/python examples/offload.py [MODEL FOLDER] [MIB]
"""

import sys
from pathlib import Path

from moe_serve import LLM, SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
PROMPT = "It was a dark and stormy night, and"


def answer(model: str, cache_mib: int) -> str:
    with LLM(model, moe_cache_mib=cache_mib, max_model_len=256, num_kv_pages=64) as llm:
        (result,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))
        report = llm.engine.expert_report()
        assert report is not None
        hits, misses = report.counts["hits"].sum(), report.counts["misses"].sum()
        print(f"{cache_mib or 'all'} MiB: {hits} of {hits + misses} uses found their expert in memory")
        return result.outputs[0].text


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(DEMO)
    cache_mib = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    few, all_mapped = answer(model, cache_mib), answer(model, 0)
    print(f"{PROMPT}{few}")
    print("the same tokens" if few == all_mapped else "other tokens: please report this")


if __name__ == "__main__":
    main()
