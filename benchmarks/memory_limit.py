"""Run a command with a hard limit on its memory, page cache included, and say how much it used.

    python benchmarks/memory_limit.py --limit-mb 1800 [--cold FILE ...] -- COMMAND ...

The limit is a cgroup's, version 1 or 2: pages of files the command reads or maps count like its own
memory, which is what makes offloading cost something on a machine with memory to spare. Without the
right to make a cgroup nothing is run, because a run without the limit would measure something else.
Knows nothing of models. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CGROUP_ROOT = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
SAMPLE_S = 0.02


class MemoryLimitUnavailableError(RuntimeError):
    """This machine or user cannot set a memory limit; the message says why and what would help."""


@dataclass(frozen=True)
class GroupFiles:
    """What differs between the two versions: the folder groups are made in, and names of files."""

    parent: Path
    limit: str
    peak: str
    swap: tuple[str, str | None]
    """Name of the file that rules out swap, and what to write; None: the limit itself."""


def group_files(root: Path = CGROUP_ROOT) -> GroupFiles:
    """The memory controller under `root`; raises MemoryLimitUnavailableError if there is none."""
    if (root / "memory" / "memory.limit_in_bytes").is_file():
        swap = ("memory.memsw.limit_in_bytes", None)
        return GroupFiles(root / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", swap)
    controllers = root / "cgroup.controllers"
    if controllers.is_file() and "memory" in controllers.read_text().split():
        return GroupFiles(root, "memory.max", "memory.peak", ("memory.swap.max", "0"))
    raise MemoryLimitUnavailableError(f"no cgroup memory controller under {root}; run on Linux with one mounted")


class MemoryGroup:
    """One cgroup with a memory limit; processes join by writing their id to `procs`."""

    def __init__(self, folder: Path, files: GroupFiles, limit_bytes: int) -> None:
        self.procs = folder / "cgroup.procs"
        self._folder = folder
        self._files = files
        (folder / files.limit).write_text(str(limit_bytes))
        name, value = files.swap
        # Absent where the kernel counts no swap; the limit on memory alone would let pages escape there.
        if (folder / name).is_file():
            (folder / name).write_text(value or str(limit_bytes))

    def peak_bytes(self) -> int:
        """Most memory charged at one time, page cache included."""
        return int((self._folder / self._files.peak).read_text())


@contextmanager
def memory_group(limit_bytes: int, root: Path = CGROUP_ROOT) -> Iterator[MemoryGroup]:
    """A fresh cgroup limited to `limit_bytes`, removed afterwards; its processes must have ended by then."""
    files = group_files(root)
    folder = files.parent / f"moe-serve-bench-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if files.limit == "memory.max":
            (files.parent / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
    except OSError as error:
        raise MemoryLimitUnavailableError(f"cannot make {folder}: {error.strerror}; run as root") from error
    try:
        yield MemoryGroup(folder, files, limit_bytes)
    finally:
        folder.rmdir()


def drop_page_cache(files: Iterable[Path]) -> None:
    """Make the next reads of these files come from the disk; as root, of all files no process has mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # dirty pages would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("3")


@dataclass(frozen=True)
class LimitedRun:
    """What a command printed and used."""

    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    peak_cgroup_bytes: int
    """All memory charged to the group: the process, its page cache, and the kernel's memory on its behalf."""
    peak_rss_bytes: int
    """VmHWM: resident pages, mapped files included."""
    peak_anon_bytes: int
    """Largest sample of RssAnon: resident pages no file stands behind."""
    disk_reads: tuple[tuple[float, int], ...]
    """(seconds since the start, bytes read from the disk until then), every 20 ms."""

    def disk_bytes_in_last(self, seconds: float) -> int:
        """Bytes read from the disk in the last `seconds` of the run."""
        end_s, total = self.disk_reads[-1]
        before = [count for at_s, count in self.disk_reads if at_s <= end_s - seconds]
        return total - (before[-1] if before else 0)


class UsageSampler(threading.Thread):
    """Watches a process's memory and disk reads from outside until it ends or `stop` is called."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_rss_bytes = 0
        self.peak_anon_bytes = 0
        self.disk_reads: list[tuple[float, int]] = [(0.0, 0)]
        self._proc = Path("/proc") / str(pid)
        self._start_s = time.perf_counter()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            try:
                self._sample()
            except (OSError, KeyError):  # it has ended: no such process, or one without memory
                return

    def _sample(self) -> None:
        status = read_fields(self._proc / "status")
        self.peak_rss_bytes = max(self.peak_rss_bytes, 1024 * status["VmHWM"])
        self.peak_anon_bytes = max(self.peak_anon_bytes, 1024 * status["RssAnon"])
        read_bytes = read_fields(self._proc / "io")["read_bytes"]
        self.disk_reads.append((time.perf_counter() - self._start_s, read_bytes))

    def stop(self) -> None:
        self._done.set()
        self.join()


def read_fields(file: Path) -> dict[str, int]:
    """The lines `name: number ...` of a file in /proc; other lines are left out."""
    pairs = (line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    numbers = ((name, value.split()[:1]) for name, value in pairs)
    return {name: int(value[0]) for name, value in numbers if value and value[0].isdecimal()}


def run_limited(
    command: Sequence[str],
    limit_bytes: int,
    cold_files: Iterable[Path] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float = 900.0,
    root: Path = CGROUP_ROOT,
) -> LimitedRun:
    """Run `command` in a cgroup of its own, after dropping `cold_files` from the page cache.

    `env` adds to the environment. A command that needs more memory is killed by the kernel and
    returns -9; one that takes longer than `timeout_s` is killed and raises TimeoutExpired.
    """
    drop_page_cache(cold_files)
    with memory_group(limit_bytes, root) as group, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # The shell joins the group and becomes the command, so that not one page escapes the limit.
        joined = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.procs), *command]
        start = time.perf_counter()
        process = subprocess.Popen(joined, stdout=out, stderr=err, env={**os.environ, **(env or {})})
        sampler = UsageSampler(process.pid)
        sampler.start()
        try:
            process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
            sampler.stop()
        wall_s = time.perf_counter() - start
        return LimitedRun(
            process.returncode,
            _text(out),
            _text(err),
            wall_s,
            group.peak_bytes(),
            sampler.peak_rss_bytes,
            sampler.peak_anon_bytes,
            tuple(sampler.disk_reads),
        )


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mb", type=float, required=True, help="10^6 bytes, page cache included")
    parser.add_argument("--cold", type=Path, nargs="*", default=[], metavar="FILE", help="dropped from the page cache")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    run = run_limited(args.command, int(args.limit_mb * 1e6), args.cold)
    sys.stdout.write(run.stdout)
    sys.stderr.write(run.stderr)
    peaks = (run.peak_cgroup_bytes, run.peak_rss_bytes, run.peak_anon_bytes, run.disk_reads[-1][1])
    charged, resident, anonymous, read = (f"{value / 1e6:.0f} MB" for value in peaks)
    print(f"peak charged {charged}, resident {resident}, anonymous {anonymous}; read {read}", file=sys.stderr)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
