"""Two network namespaces joined by a link of a given rate and delay, and a command run in both: node 0 and node 1.

    python benchmarks/shaped_link.py --mbit 1000 --delay-ms 2 -- COMMAND        as root; {node} in COMMAND is 0 or 1

Node 0 is 10.77.0.1, node 1 is 10.77.0.2; the link's ends are called shaped0 and shaped1. It is two TUN devices with
this process between them, because kernels without netem cannot delay, and takes CPU time of its own: on a busy
machine it is slower than it says.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 9000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--delay-ms", type=float, default=2.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    ends = [open_end(node) for node in (0, 1)]
    try:
        threading.Thread(target=relay, args=(ends, args.mbit * 1e6 / 8, args.delay_ms / 1e3), daemon=True).start()
        nodes = [run_in(node, [word.replace("{node}", str(node)) for word in command]) for node in (0, 1)]
        return max(process.wait() for process in nodes)
    finally:  # with the namespaces go the link's ends, and the relay with them
        for node in (0, 1):
            subprocess.run(["ip", "netns", "del", f"shaped{node}"], check=True)


def open_end(node: int) -> int:
    """A namespace with one end of the link in it; the file descriptor of the end."""
    name = f"shaped{node}"
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    inside = f"ip netns exec {name} ip"
    for line in (
        f"ip netns add {name}",
        f"ip link set {name} netns {name}",
        f"{inside} link set lo up",
        f"{inside} addr add 10.77.0.{node + 1}/24 dev {name}",
        f"{inside} link set {name} mtu {MTU} up",
    ):
        subprocess.run(line.split(), check=True)
    return end


def run_in(node: int, command: list[str]) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": f"shaped{node}"}
    return subprocess.Popen(["ip", "netns", "exec", f"shaped{node}", *command], env=environ)


def relay(ends: list[int], bytes_per_s: float, delay_s: float) -> None:
    """Until the ends are gone."""
    with contextlib.suppress(OSError):
        forward(ends, bytes_per_s, delay_s)


def forward(ends: list[int], bytes_per_s: float, delay_s: float) -> None:
    """Each packet leaves after the ones before it at the link's rate, and arrives `delay_s` later."""
    waiting: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    free_at = [0.0, 0.0]
    while True:
        now = time.monotonic()
        due = [queue[0][0] for queue in waiting if queue]
        ready, _, _ = select.select(ends, [], [], max(0.0, min(due) - now) if due else None)
        now = time.monotonic()
        for side, end in enumerate(ends):
            if end in ready:
                packet = os.read(end, MTU + 64)
                free_at[side] = max(now, free_at[side]) + len(packet) / bytes_per_s
                waiting[side].append((free_at[side] + delay_s, packet))
            while waiting[side] and waiting[side][0][0] <= now:
                os.write(ends[1 - side], waiting[side].popleft()[1])


if __name__ == "__main__":
    sys.exit(main())
