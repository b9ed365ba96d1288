"""What the kernel enforces on a grammar's process: memory, CPU time, stack, and that it goes with its parent."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

STACK_BYTES = 256 << 20
"""Address space for the thread that compiles: some 30 times the usual 8 MiB; only what is used takes memory."""
LOW_PRIORITY = 10
"""As of nice: beside a thread at 0 it gets a tenth of a core."""
LOWEST_PRIORITY = 19
PR_SET_PDEATHSIG = 1


def no_core_dumps() -> None:
    """A compiler that dies by a hostile grammar leaves no file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, and be the first to go when memory runs out."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def silence() -> None:
    """Nothing goes to the server's log from here: why Rust aborts, the server says in its answer."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(nothing, fd)
    os.close(nothing)


def with_deep_stack(function: Callable[[], None]) -> None:
    """Run `function` on a thread with a stack of STACK_BYTES."""
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def low_priority_thread(is_idle: bool) -> ThreadPoolExecutor:
    """One thread, already running, that gives way to everything else: compiling can wait, steps cannot.

    `is_idle`: it leaves a core at once when another thread wakes, and may get no time at all.

    A thread of its own, since a thread's priority can be lowered and not raised again. Its stack takes STACK_BYTES of
    address space, so it is made before limit_memory counts what may be added, and kept until the process ends.
    """

    pool = ThreadPoolExecutor(1, initializer=_become_idle if is_idle else _become_low)
    pool.submit(lambda: None).result()
    return pool


def _become_low(priority: int = LOW_PRIORITY) -> None:
    """A server that has a lower one keeps it: raising is for root only."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(priority, os.getpriority(os.PRIO_PROCESS, thread)))


def _become_idle() -> None:
    """Some containers refuse the policy; the lowest priority comes near to it."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        _become_low(LOWEST_PRIORITY)


def limit_memory(more_bytes: int) -> None:
    """Limit the address space to its present size and `more_bytes`; allocations beyond it fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGESIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit_cpu(more_s: int) -> None:
    """SIGXCPU after `more_s` more seconds of CPU time. This ends a process that its parent no longer waits for."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + more_s + 1, resource.RLIM_INFINITY))


def lift_cpu_limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def peak_kib() -> int:
    """Most memory this process has held at once, what it shares with its parent included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
