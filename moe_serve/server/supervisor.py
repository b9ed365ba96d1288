"""The supervisor: a small parent process that starts serving again after a signal has ended it.

It forks before torch is imported, so it stays small and a start costs nothing. Native code, a truncated file or the
kernel's out-of-memory killer can end the serving process; the supervisor logs the signal and forks again.
Exit statuses pass through. Knows no settings, no model and no HTTP. Linux only.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask for the end. A process that dies of one is not started again."""
MAX_DEATHS = 5
WINDOW_S = 300.0
"""More than MAX_DEATHS deaths in this time end the supervisor too."""
FIRST_PAUSE_S = 0.25
"""Before the first restart; doubled with every further death in the window."""
PR_SET_PDEATHSIG = 1


def supervise() -> int | None:
    """Fork the process that serves. There, None: go on and serve. In the supervisor, once serving has ended for good:
    the exit status. If a signal ended it, the supervisor ends by that signal too."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited SIG_IGN would hide how children end
    signal.pthread_sigmask(signal.SIG_BLOCK, _watched())
    supervisor = Supervisor()
    while True:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return None
        status = supervisor.watch(child)
        if status is not None:
            return status if status >= 0 else _end_by(signal.Signals(-status))


def _watched() -> set[signal.Signals]:
    """Signals to wait for. A hang-up that `nohup` ignores stays ignored."""
    orders = {order for order in ORDERS if order is not signal.SIGHUP or signal.getsignal(order) is signal.SIG_DFL}
    return orders | {signal.SIGCHLD}


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the supervisor is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(128 + signal.SIGKILL)


def _end_by(number: signal.Signals) -> int:
    """End by the signal that ended the child, without a core of our own. Process 1 ignores it: returns 128 + signal."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    return 128 + number


class Supervisor:
    """What the parent remembers from one child to the next. Its signals must be blocked (see `_watched`)."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._deaths: deque[float] = deque()

    def watch(self, child: int) -> int | None:
        """Wait for `child`, a process id, and forward orders to it. The end of all: its exit status, or minus the
        signal. None: start another."""
        is_ordered = False
        while (status := _reap(child)) is None:
            order = signal.sigwaitinfo(_watched())
            if order.si_signo == signal.SIGCHLD:
                continue
            if is_ordered:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 128 + order.si_signo
            is_ordered = True
            if order.si_code <= 0:  # sent by a process; a terminal's goes to the child as well
                os.kill(child, order.si_signo)
        if is_ordered or status >= 0 or -status in ORDERS:
            return status
        return self._after_death(child, signal.Signals(-status))

    def _after_death(self, child: int, number: signal.Signals) -> int | None:
        """Log the death and pause. None: start another child."""
        pause_s = self.next_pause_s()
        killer = " (perhaps the kernel's, for lack of memory)" if number is signal.SIGKILL else ""
        what = f"the serving process {child} died of {number.name}{killer}"
        if pause_s is None:
            log.critical("%s; death %d in %g s, the server ends", what, len(self._deaths), WINDOW_S)
            return -number
        log.error("%s; it starts again in %g s (death %d of %d)", what, pause_s, len(self._deaths), MAX_DEATHS)
        return 0 if _is_told_to_end(pause_s) else None

    def next_pause_s(self) -> float | None:
        """How long to wait after a death that happens now; None: this one was too many."""
        now = self._now()
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > MAX_DEATHS:
            return None
        return float(FIRST_PAUSE_S * 2 ** (len(self._deaths) - 1))


def _reap(child: int) -> int | None:
    """The child's exit status, or minus the signal that ended it; None while it runs. As process 1 of a container, the
    supervisor inherits and reaps others' children too."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return None
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _is_told_to_end(pause_s: float) -> bool:
    """Wait, unless an order comes."""
    return signal.sigtimedwait(_watched() - {signal.SIGCHLD}, pause_s) is not None
