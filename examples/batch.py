"""Answer a file of questions, many at once: one JSON object a line goes in, one comes out, in the same order.

.venv/bin/python examples/batch.py questions.jsonl answers.jsonl [MODEL FOLDER]

A line in: {"id": "a", "question": "..."}. A line out: {"id": "a", "answer": "..."}.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from moe_serve import AsyncLLM, MoEServeError, SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
PARAMS = SamplingParams(temperature=0, max_tokens=32)


async def answer(llm: AsyncLLM, row: dict[str, Any]) -> dict[str, Any]:
    try:
        result = await llm.chat([{"role": "user", "content": row["question"]}], PARAMS)
    except MoEServeError as error:  # one that is too long must not end the others
        return {"id": row["id"], "error": error.message}
    return {"id": row["id"], "answer": result.outputs[0].text.strip()}


async def main() -> None:
    questions, answers = Path(sys.argv[1]), Path(sys.argv[2])
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    async with AsyncLLM(sys.argv[3] if len(sys.argv) > 3 else str(DEMO), max_model_len=256) as llm:
        results = await asyncio.gather(*(answer(llm, row) for row in rows))
    answers.write_text("".join(json.dumps(result) + "\n" for result in results))
    print(f"{len(results)} answers in {answers}")


if __name__ == "__main__":
    asyncio.run(main())
