"""How much memory may still be taken: the machine's, within the container's limit. Knows Linux's files.

File pages the kernel can drop count as free, on both levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_serve.errors import ConfigError

NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class CgroupFiles:
    """Where a version of control groups keeps a container's limit, its use, and the file pages in it."""

    limit: str
    used: str
    stat: str
    file_pages: tuple[str, ...]


CGROUP_VERSIONS = (
    CgroupFiles("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    CgroupFiles(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken on the device. torch keeps what it has freed, and gives it out again."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(_available(), *(_left(root, v) for root in _cgroup_roots() for v in CGROUP_VERSIONS))


def release_pinned() -> None:
    """Give pinned host memory that is free again back to the system; torch keeps it otherwise."""
    if not torch.cuda.is_available():
        return
    for name in ("_accelerator_emptyHostCache", "_host_emptyCache"):  # torch 2.12 and newer; 2.11
        release = getattr(torch._C, name, None)
        if release is not None:
            release()
            return


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; give --kv-cache-mib and --moe-cache-mib")


def _cgroup_roots() -> Iterator[Path]:
    """Folders that may describe this process's limit: the root a container sees, and the group by name."""
    mount = Path("/sys/fs/cgroup")
    yield mount
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            yield mount / group.lstrip("/")


def _left(root: Path, version: CgroupFiles) -> int:
    """Bytes left under one limit; NO_LIMIT without one."""
    paths = [_locate(root, name) for name in (version.limit, version.used, version.stat)]
    try:
        limit, used = paths[0].read_text().strip(), int(paths[1].read_text())
        stat = dict(line.split() for line in paths[2].read_text().splitlines())
    except (OSError, ValueError):
        return NO_LIMIT
    reclaimable = sum(int(stat.get(name, 0)) for name in version.file_pages)
    return NO_LIMIT if limit == "max" else max(0, int(limit) - used + reclaimable)


def _locate(root: Path, name: str) -> Path:
    """In version 1 the group's folder lies below the controller's."""
    mount = Path("/sys/fs/cgroup")
    if root != mount and name.startswith("memory/"):
        return mount / "memory" / root.relative_to(mount) / name.removeprefix("memory/")
    return root / name
