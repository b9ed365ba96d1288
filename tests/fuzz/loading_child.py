"""Loads checkpoint folders and completes a prompt with each: a process of its own, which a folder may end.

    python -m tests.fuzz.loading_child

Reads a folder's name per line and writes what came of it per line, as JSON.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

from moe_serve import LLM, SamplingParams
from moe_serve.errors import MoEServeError
from moe_serve.text.generation_defaults import read_generation_defaults

MEMORY_BYTES = 1 << 30
"""Beyond what the imports take. The checkpoints take less than 2 MiB."""
SETTINGS: dict[str, Any] = {"device": "cpu", "num_threads": 1, "num_kv_pages": 8, "max_num_seqs": 2}
PROMPT = [1, 2, 3]
SAMPLING = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=0, prompt_logprobs=0)


def outcome(folder: str) -> dict[str, Any]:
    """{"finite": bool}, or {"refused": message}, or {"crashed": traceback}."""
    try:
        SamplingParams(**read_generation_defaults(folder))
        with LLM(folder, **SETTINGS) as llm:
            (result,) = llm.generate(PROMPT, SAMPLING)
            vocab_size = llm.engine.spec.vocab_size
    except MoEServeError as error:
        return {"refused": error.message}
    except Exception:
        return {"crashed": traceback.format_exc()}
    (completion,) = result.outputs
    scores = [entry.logprob for entry in (*result.prompt_logprobs, *completion.logprobs)]
    in_range = all(0 <= token < vocab_size for token in completion.token_ids)
    return {"finite": len(scores) == len(PROMPT) + 1 and all(map(math.isfinite, scores)) and in_range}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        answers.write(json.dumps(outcome(line.rstrip("\n"))) + "\n")


if __name__ == "__main__":
    main()
