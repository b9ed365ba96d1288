"""Greedy decoding by transformers with accelerate's disk offload: one prompt, one JSON line on stdout.

    python benchmarks/accelerate_decode.py FOLDER '{"prompt_ids": [5, 6, 7], "num_tokens": 8,
        "cpu_bytes": 1000000000, "offload_folder": "/tmp/offload", "experts": "eager", "threads": 2}'

offload_peers.py runs this as a process of its own, under a memory limit; it needs accelerate and
nothing of moe-serve. `cpu_bytes` is the budget accelerate fills with layers, its own way
(device_map="auto"); the rest stays in files: straight in the checkpoint's where transformers keeps
the tensor as it is stored, re-saved into the offload folder where it does not (fused experts).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from memory_limit import read_fields


def load(folder: str, job: dict[str, Any]) -> Any:
    """The model, as many layers in memory as fit, in the dtype of the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": job["cpu_bytes"]},
        offload_folder=job["offload_folder"],
        experts_implementation=job["experts"],
    ).eval()


def decode(model: Any, prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """The first token comes with the prompt; time and disk reads count from there on."""
    import torch

    with torch.inference_mode():
        out = model(torch.tensor([prompt_ids]), use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        read_before, start = _disk_read_bytes(), time.perf_counter()
        while len(tokens) < num_tokens:
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        decode_s = time.perf_counter() - start
    return {"tokens": tokens, "decode_s": decode_s, "disk_read_bytes": _disk_read_bytes() - read_before}


def _disk_read_bytes() -> int:
    return read_fields(Path("/proc/self/io"))["read_bytes"]


def main() -> None:
    folder, job = sys.argv[1], json.loads(sys.argv[2])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = load(folder, job)
    places = list(model.hf_device_map.values())
    result = decode(model, job["prompt_ids"], job["num_tokens"])
    print(json.dumps({**result, "modules_on_disk": places.count("disk"), "modules": len(places)}))


if __name__ == "__main__":
    main()
