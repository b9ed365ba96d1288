"""GGUF files beside llama.cpp: the same tensors, the same ids of texts, the same template, the same greedy tokens?

    python benchmarks/check_gguf.py FOLDER ... --llama TREE [--pre qwen2] [--kinds f32 bf16 q8_0 q4_k_m]

Each FOLDER is a Hugging Face checkpoint. llama.cpp's script converts it and its library quantises it; the files lie in
FOLDER/gguf and are used again. Without --pre, the converter of some families needs the package `sentencepiece`.

moe-serve computes in float32. llama.cpp rounds activations to what the weights are stored in (bf16, or 8 bits for
blocks). So each file is compared twice: with llama.cpp on the same file, and with llama.cpp on that file dequantised to
f32 by llama.cpp itself. The second has the same weights and no rounding: there all tokens must be equal.

A line of the report is one kind of one folder. Where tokens part, it has the margin of llama.cpp's choice. The exit
status is 1 if ids of texts or chat templates differ, tensors of f32, or tokens beside f32 where the margin is above
TIE.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from llama_greedy import KINDS, Answer, Peer
from measuring import fix_environment

FLOATS = ("f32", "f16", "bf16")
USUAL = ("f32", "bf16", "q8_0", "q4_k_m")
TIE = 0.001
"""Logits closer than this can change places by the order of a sum."""
ROUNDING = 1e-6
"""llama.cpp keeps exp(A) and 1 + w where checkpoints have A and w; the way back rounds."""
TEXTS = (
    "The capital of France is Paris.",
    "  two spaces,\ttab\n\nand lines\r\n ",
    "I'll say it's 1234567 or 3.14159, isn't it? DON'T!!",
    "naïve café, Füße, Привет мир, 你好世界こんにちは 안녕",
    "👩‍👩‍👧 emoji \u00a0 no-break",
    "def f(x):\n    return x**2  # comment\n",
    "",
    "a",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--llama", type=Path, required=True, metavar="TREE", help="llama.cpp's source tree, built")
    parser.add_argument("--llama-build", default="build", metavar="NAME", help="the build's folder in TREE")
    parser.add_argument("--pre", default="auto", help="how the tokenizer cuts text, where the converter cannot tell")
    parser.add_argument("--kinds", nargs="+", choices=[*FLOATS, *sorted(KINDS.keys() - set(FLOATS))], default=USUAL)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    fix_environment(args.threads)
    try:
        peer = Peer(args.llama, args.llama_build, args.threads)
        agree = [check_folder(args, peer, folder) for folder in args.folders]
    except SystemExit as error:
        print(error)
        agree = [False]
    sys.stdout.flush()
    os._exit(0 if all(agree) else 1)  # two OpenMP libraries in a process do not end well


def check_folder(args: argparse.Namespace, peer: Peer, folder: Path) -> bool:
    """Whether what must agree does, over all kinds."""
    own = Side(folder, args.threads)
    agrees = True
    for kind in args.kinds:
        problems = check_kind(args, peer, own, folder, kind)
        for problem in problems:
            print(f"  PROBLEM {problem}", flush=True)
        agrees = agrees and not problems
    own.close()
    return agrees


def check_kind(args: argparse.Namespace, peer: Peer, own: Side, folder: Path, kind: str) -> list[str]:
    """What must agree and does not."""
    file, prompts = gguf_file(args, peer, folder, kind), own.prompts()
    ours = Side(file, args.threads)
    found = ours.greedy(prompts, args.new_tokens)
    with peer.open(file) as theirs:
        rounded = [theirs.greedy(prompt, args.new_tokens) for prompt in prompts]
        problems = text_problems(own, ours, theirs)
    with peer.open(as_f32(peer, file)) as theirs:
        exact = [theirs.greedy(prompt, args.new_tokens) for prompt in prompts]
    if kind == "f32":
        problems += ours.differing_tensors(own)
    problems += [f"tokens: {line}" for line, margin in partings(found, exact) if margin > TIE]
    expected = own.greedy(prompts, args.new_tokens)
    print(f"{folder.name} {kind}: of {len(prompts)} prompts, tokens equal to", flush=True)
    print(f"  llama.cpp in float32: {agreement(found, exact)}", flush=True)
    print(f"  llama.cpp: {agreement(found, rounded)}", flush=True)
    print(f"  the folder: {sum(a == b for a, b in zip(found, expected, strict=True))}", flush=True)
    ours.close()
    return problems


def gguf_file(args: argparse.Namespace, peer: Peer, folder: Path, kind: str) -> Path:
    """Converted or quantised once."""
    file = folder / "gguf" / f"{kind}.gguf"
    if file.is_file():
        return file
    file.parent.mkdir(exist_ok=True)
    if kind not in FLOATS:
        peer.quantize(gguf_file(args, peer, folder, "f32"), file, kind)
        return file
    script = Path(__file__).parent / "convert_to_gguf.py"
    command = [sys.executable, script, args.llama, args.pre, folder, "--outtype", kind, "--outfile", file]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return file


def as_f32(peer: Peer, file: Path) -> Path:
    """The file dequantised by llama.cpp."""
    exact = file.with_name(f"{file.stem}-as-f32.gguf")
    if not exact.is_file():
        peer.quantize(file, exact, "f32")
    return exact


class Side:
    """moe-serve on a folder or a GGUF file."""

    def __init__(self, model: Path, threads: int) -> None:
        from moe_serve import LLM

        settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": threads, "max_num_seqs": 8}
        self.llm = LLM(str(model), max_model_len=256, num_kv_pages=256, **settings)

    def prompts(self) -> list[list[int]]:
        """Ids of texts and of runs through the vocabulary."""
        size = self.llm.tokenizer.vocab_size
        runs = [[(start + 7 * i) % size for i in range(length)] for start, length in ((3, 1), (11, 20), (50, 90))]
        return [*runs, *(ids for text in TEXTS[:3] if (ids := self.llm.tokenizer.encode(text)))]

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        from moe_serve import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return [list(result.completions[0].token_ids) for result in self.llm.generate(list(prompts), params)]

    def tensors(self) -> dict[str, Any]:
        """All parameters as served, experts one by one."""
        from moe_serve.hf.checkpoint import open_all_experts

        runner: Any = self.llm.engine.runner
        found = {name: tensor.float() for name, tensor in runner.model.state_dict().items()}
        store = open_all_experts(self.llm.engine.config.model)
        for layer in store.layers:
            for expert in range(store.num_experts):
                weights = store.weights(layer, expert)
                for part in ("gate", "up", "down"):
                    found[f"experts.{layer}.{expert}.{part}"] = getattr(weights, part).float()
        return found

    def differing_tensors(self, other: Side) -> list[str]:
        import torch

        mine, others = self.tensors(), other.tensors()
        names = sorted(mine.keys() ^ others.keys())
        both = mine.keys() & others.keys()
        differ = [name for name in both if not torch.allclose(mine[name], others[name], rtol=ROUNDING, atol=ROUNDING)]
        return [f"tensor {name}" for name in [*names, *sorted(differ)]]

    def close(self) -> None:
        self.llm.close()


def text_problems(own: Side, ours: Side, theirs: Any) -> list[str]:
    """Where the three disagree about texts or the template."""
    problems = []
    for text in TEXTS:
        found = [side.llm.tokenizer.encode(text) for side in (own, ours)] + [theirs.tokens(text)]
        if any(ids != found[0] for ids in found):
            problems.append(f"ids of {text!r}: folder {found[0]}, GGUF {found[1]}, llama.cpp {found[2]}")
    templates = [own.llm.tokenizer.hf.chat_template, ours.llm.tokenizer.hf.chat_template, theirs.chat_template()]
    if any(template != templates[0] for template in templates):
        problems.append(f"chat templates: {templates}")
    return problems


def partings(found: Sequence[list[int]], answers: Sequence[Answer]) -> list[tuple[str, float]]:
    """Where the tokens of a prompt part, and llama.cpp's margin there."""
    pairs = []
    for ours, theirs in zip(found, answers, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs.ids, strict=True)) if a != b), None)
        if at is not None:
            pairs.append((f"token {at} of {len(ours)}, margin {theirs.margins[at]:.4f}", theirs.margins[at]))
    return pairs


def agreement(found: Sequence[list[int]], answers: Sequence[Answer]) -> str:
    """How many prompts agree, and where the others part."""
    lines = [line for line, _ in partings(found, answers)]
    return "; ".join([str(len(found) - len(lines)), *lines])


if __name__ == "__main__":
    sys.exit(main())
