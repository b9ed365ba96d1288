"""Greedy decoding by systems that are not ours, with memory for only a part of the model.

    python benchmarks/offload_peers.py --limit-mb 1800 --num-tokens 32 \\
        [--gguf FILE --llama-completion BINARY] [--accelerate FOLDER [--python PYTHON]]

Each side is a function `run_<side>(model, prompt_ids, num_tokens, limit_bytes, ...) -> SideResult`:
a fresh process under the limit of memory_limit.py, files not in the page cache, batch 1. Speed is
that of the decode steps; loading and the prompt do not count. Neither peer is a dependency: one that
is absent raises SideUnavailableError.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from memory_limit import LimitedRun, run_limited

ACCELERATE_SCRIPT = Path(__file__).with_name("accelerate_decode.py")
PROCESS_BYTES = 700_000_000
"""What Python, torch and one layer being computed take beside the layers accelerate keeps in memory."""


class SideUnavailableError(RuntimeError):
    """The peer is not installed or was not built; the message says what is missing."""


class SideFailedError(RuntimeError):
    """The peer ran and gave no figure; the message has the end of what it printed."""


@dataclass(frozen=True)
class SideResult:
    """One run of one side."""

    side: str
    tokens: tuple[int, ...]
    """Generated tokens; the first comes with the prompt."""
    decode_s: float
    """Seconds of the len(tokens) - 1 decode steps."""
    disk_read_bytes: int
    """Read from the disk by the process during these."""
    peak_rss_bytes: int
    peak_anon_bytes: int
    peak_cgroup_bytes: int
    """Charged to the limit, page cache included."""
    notes: str

    @property
    def tokens_per_s(self) -> float:
        return (len(self.tokens) - 1) / self.decode_s


def run_llama_cpp(
    gguf: Path, prompt_ids: Sequence[int], num_tokens: int, limit_bytes: int, binary: Path, threads: int = 2
) -> SideResult:
    """llama-completion with its default way of loading, mmap: the page cache is its expert cache.

    `gguf` must have a stand-in vocabulary, token i being the user-defined text "<i>": then a prompt of
    ids is a text, and the text that comes back is ids. Reads grow with the disk's read_ahead_kb.
    """
    if not (binary.is_file() and gguf.is_file()):
        raise SideUnavailableError(f"llama.cpp needs its binary {binary} and the model {gguf}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt:
        prompt.write("".join(f"<{i}>" for i in prompt_ids))
        prompt.flush()
        command = [str(binary), "-m", str(gguf), "-f", prompt.name, "-n", str(num_tokens), "-t", str(threads)]
        # No conversation template, no warm-up (it would read every expert), greedy, never the end token.
        command += ["-no-cnv", "--no-warmup", "--no-display-prompt", "--temp", "0", "--ignore-eos", "-c", "1024"]
        run = run_limited(command, limit_bytes, cold_files=[gguf])
    tokens = tuple(int(i) for i in re.findall(r"<(\d+)>", run.stdout))
    found = re.search(r"\beval time =\s*([\d.]+) ms /\s*(\d+) runs", run.stderr)
    if run.returncode or found is None or int(found[2]) != len(tokens) - 1:
        raise SideFailedError(_failure("llama.cpp", run))
    decode_s = float(found[1]) / 1e3
    return _result("llama.cpp", run, tokens, decode_s, run.disk_bytes_in_last(decode_s), f"mmap, {gguf.name}")


def run_accelerate(
    folder: Path,
    prompt_ids: Sequence[int],
    num_tokens: int,
    limit_bytes: int,
    python: Path = Path(sys.executable),
    threads: int = 2,
    experts: str = "eager",
    cpu_bytes: int | None = None,
    offload_parent: Path | None = None,
) -> SideResult:
    """transformers with accelerate's disk offload.

    `cpu_bytes` of layers stay in memory, by default all the limit leaves; the others may need their
    bytes again under `offload_parent` (default: beside the checkpoint), deleted afterwards.
    """
    if subprocess.run([python, "-c", "import accelerate, transformers"], capture_output=True).returncode:
        raise SideUnavailableError(f"{python} cannot import accelerate and transformers")
    with tempfile.TemporaryDirectory(dir=offload_parent or folder.parent) as offload_folder:
        job = {
            "prompt_ids": list(prompt_ids),
            "num_tokens": num_tokens,
            "cpu_bytes": limit_bytes - PROCESS_BYTES if cpu_bytes is None else cpu_bytes,
            "offload_folder": offload_folder,
            "experts": experts,
            "threads": threads,
        }
        env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        command = [str(python), str(ACCELERATE_SCRIPT), str(folder), json.dumps(job)]
        run = run_limited(command, limit_bytes, cold_files=folder.glob("*.safetensors"), env=env)
    if run.returncode:
        raise SideFailedError(_failure("accelerate", run))
    said = json.loads(run.stdout.splitlines()[-1])
    notes = f"{experts}, {said['modules_on_disk']} of {said['modules']} modules on disk"
    return _result("accelerate", run, tuple(said["tokens"]), said["decode_s"], said["disk_read_bytes"], notes)


def _result(
    side: str, run: LimitedRun, tokens: tuple[int, ...], decode_s: float, disk_read_bytes: int, notes: str
) -> SideResult:
    peaks = (run.peak_rss_bytes, run.peak_anon_bytes, run.peak_cgroup_bytes)
    return SideResult(side, tokens, decode_s, disk_read_bytes, *peaks, notes)


def _failure(side: str, run: LimitedRun) -> str:
    killed = " (killed by the kernel: the limit is too low)" if run.returncode == -9 else ""
    return f"{side} returned {run.returncode}{killed} after {run.wall_s:.0f} s:\n{run.stderr[-2000:]}"


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids from 3 on: the demo tokenizer's first three are special."""
    chooser = random.Random(seed)
    return [chooser.randrange(3, vocab_size) for _ in range(length)]


def print_result(result: SideResult) -> None:
    """One readable line, then the JSON of it."""
    reads = result.disk_read_bytes / 1e6
    print(
        f"{result.side}: {result.tokens_per_s:.3f} tokens/s, {reads / (len(result.tokens) - 1):.0f} MB from disk"
        f" per token at {reads / result.decode_s:.0f} MB/s, peak charged {result.peak_cgroup_bytes / 1e6:.0f} MB,"
        f" resident {result.peak_rss_bytes / 1e6:.0f} MB, anonymous {result.peak_anon_bytes / 1e6:.0f} MB"
    )
    print(json.dumps({**asdict(result), "tokens_per_s": result.tokens_per_s}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mb", type=float, required=True)
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the prompt")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-completion", type=Path, metavar="BINARY")
    parser.add_argument("--accelerate", type=Path, metavar="FOLDER", help="the checkpoint")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="one that can import accelerate")
    parser.add_argument("--experts", default="eager", help="transformers' experts implementation")
    parser.add_argument("--cpu-mb", type=float, help="of layers accelerate keeps in memory")
    args = parser.parse_args()
    prompt = random_prompt(args.prompt_len, args.vocab_size, args.seed)
    common = (prompt, args.num_tokens, int(args.limit_mb * 1e6))
    if args.gguf and args.llama_completion:
        print_result(run_llama_cpp(args.gguf, *common, binary=args.llama_completion))
    if args.accelerate:
        cpu_bytes = None if args.cpu_mb is None else int(args.cpu_mb * 1e6)
        print_result(
            run_accelerate(args.accelerate, *common, python=args.python, experts=args.experts, cpu_bytes=cpu_bytes)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
