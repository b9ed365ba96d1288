"""Answer several prompts at once inside an asyncio program, and stream one more.

.venv/bin/python examples/async_embedding.py [MODEL FOLDER]
"""

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from moe_serve import AsyncLLM, SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
PROMPTS = ["It was a dark and stormy night, and", "The old captain looked at the sea and said,"]


async def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=16)
    async with AsyncLLM(sys.argv[1] if len(sys.argv) > 1 else str(DEMO), max_model_len=256) as llm:
        results = await asyncio.gather(*(llm.generate(prompt, params) for prompt in PROMPTS))
        for prompt, result in zip(PROMPTS, results, strict=True):
            print(f"{prompt}{result.outputs[0].text}\n")
        async with aclosing(llm.stream("Once upon a time", params)) as pieces:
            async for piece in pieces:
                print(piece.text, end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main())
