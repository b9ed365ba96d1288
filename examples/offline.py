"""Complete a few prompts without a server.

.venv/bin/python examples/offline.py [MODEL FOLDER]
"""

import sys
from pathlib import Path

from moe_serve import LLM, SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else str(DEMO))
    prompts = ["It was a dark and stormy night, and", "The old captain looked at the sea and said,"]
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=1)
    for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True):
        print(f"{prompt}{result.completions[0].text}\n")
    (answer,) = llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(temperature=0, max_tokens=40))
    print(f"Hello! -> {answer.completions[0].text}")


if __name__ == "__main__":
    main()
