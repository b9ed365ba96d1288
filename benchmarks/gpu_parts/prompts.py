"""Part `prompts`: GPT-OSS's prompts behind long contexts, whose scores nothing may keep: time and peak memory.

python -m gpu_parts.prompts gpt-oss-20b-2l
"""

from __future__ import annotations

import sys
from typing import Any

from gpu_parts import tiny
from gpu_parts.engine import SIMULATED, checkpoint
from gpu_parts.lines import Lines, is_simulated, peak_bytes_of
from gpu_parts.sides import Side, Step

CONTEXTS = (8192, 32768)
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 40960, "max_num_batched_tokens": 2048}


def main() -> int:
    lines = Lines("prompts")
    contexts = (12,) if is_simulated() else CONTEXTS
    folder = checkpoint(sys.argv[1])
    settings = SIMULATED.settings if is_simulated() else SETTINGS
    side = Side(folder, "resident, launched", 0, max_num_seqs=1, **settings)
    try:
        for seed, context in enumerate(contexts):
            with lines.row(size=sys.argv[1], context=context) as row:
                steps: list[Step] = []
                prompts = tiny.prompts((context,), seed)
                row |= peak_bytes_of(lambda prompts=prompts, steps=steps: steps.extend(side.steps(prompts, 1)))  # type: ignore[misc]
                row["last_step_s"] = steps[-1].seconds
                row["step_tokens"] = steps[-1].prompt_tokens
    finally:
        side.close()
    return lines.exit_status()


if __name__ == "__main__":
    sys.exit(main())
