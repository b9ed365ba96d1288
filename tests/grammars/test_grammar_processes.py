"""The processes behind grammars: they die alone, hold up no other, end when nothing wants them, and leave nothing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from llguidance import LLTokenizer

from moe_serve.errors import InvalidRequestError, OverloadedError
from moe_serve.grammars import allowance, compile_queue, processes, wire
from moe_serve.grammars import grammars as grammars_module
from moe_serve.grammars.compiler import limits as compiler_limits
from moe_serve.grammars.compiler.zygote import Zygote as ZygoteProcess
from moe_serve.grammars.grammars import GrammarLimits, Grammars
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.text.tokenizer import Tokenizer
from tests.grammars.hostile import slow_gbnf
from tests.grammars.walking import allowed, hold_up, masks_of, sequence
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def regex(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.REGEX, text, "guided_regex")


def made(tokenizer: Tokenizer, limits: GrammarLimits | None = None) -> Grammars:
    return Grammars.of(tokenizer, tokenizer.vocab_size, frozenset(tokenizer.eos_token_ids), limits)


@pytest.fixture
def own(tokenizer: Tokenizer) -> Iterator[Grammars]:
    """Grammars that a test may break."""
    own = made(tokenizer)
    own.zygote.start()
    yield own
    own.close()


def children_of(grammars: Grammars) -> list[psutil.Process]:
    """Processes of grammars, those that have ended and were not waited for included."""
    assert grammars.zygote.pid is not None
    found: list[psutil.Process] = psutil.Process(grammars.zygote.pid).children()
    return found


def eventually(holds: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_dies_while_stepping_ends_its_own_sequences_only(own: Grammars, tokenizer: Tokenizer) -> None:
    doomed, twin, other = (sequence(own, regex(text)) for text in ("a+", "a+", "b+"))
    assert not masks_of(tokenizer, doomed, twin, other).errors
    (pid,) = {seq.matcher.process().pid for seq in (doomed, twin)}  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSEGV)
    assert eventually(lambda: has_ended(pid)), "the signal comes some time after the call"
    masks = masks_of(tokenizer, doomed, other, twin)
    assert set(masks.errors) == {doomed, twin}
    assert all("SIGSEGV" in error.message for error in masks.errors.values())
    assert allowed(masks, 1, tokenizer.vocab_size), "the other goes on"
    again = sequence(own, regex("a+"))
    assert not masks_of(tokenizer, again).errors, "the next request gets a new process"


def test_a_stopped_process_is_ended_after_its_time(
    own: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_serve.grammars.grammar_process.STEP_S", 0.5)
    stuck, other = sequence(own, regex("a+")), sequence(own, regex("b+"))
    assert not masks_of(tokenizer, stuck, other).errors
    hold_up(stuck.matcher.process().pid)  # type: ignore[union-attr]
    masks = masks_of(tokenizer, stuck, other)
    assert list(masks.errors) == [stuck]
    assert "longer than 0.5 s" in masks.errors[stuck].message
    assert eventually(lambda: len(children_of(own)) == 1)


def test_a_killed_zygote_is_replaced(own: Grammars, tokenizer: Tokenizer) -> None:
    running = sequence(own, regex("a+"))
    assert not masks_of(tokenizer, running).errors
    process = psutil.Process(running.matcher.process().pid)  # type: ignore[union-attr]
    assert own.zygote.pid is not None
    os.kill(own.zygote.pid, signal.SIGKILL)
    assert eventually(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert list(masks_of(tokenizer, running).errors) == [running]
    own.check(regex("b+"))


def test_a_machine_without_processes_refuses_one_grammar_and_ends_none(
    own: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = sequence(own, regex("a+"))
    assert not masks_of(tokenizer, running).errors
    ask = own.zygote._ask_twice
    refused = [-errno.EAGAIN] * (len(processes.FORK_PAUSES_S) + 2)
    monkeypatch.setattr(processes, "FORK_PAUSES_S", (0.0,) * len(processes.FORK_PAUSES_S))
    monkeypatch.setattr(own.zygote, "_ask_twice", lambda *args: refused.pop() if refused else ask(*args))
    with pytest.raises(OverloadedError, match="no process can be started for a grammar: Resource temporarily"):
        own.check(regex("b+"))
    own.check(regex("b+"))  # refused once more, then there is one
    assert not refused
    assert not masks_of(tokenizer, running).errors


def test_the_zygote_survives_a_fork_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    ours, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
    channel, child = socket.socketpair()
    with ours, its, channel, child:
        zygote = ZygoteProcess(its, LLTokenizer("byte"))
        monkeypatch.setattr(os, "fork", fork)
        socket.send_fds(ours, [b'{"op": "fork", "memory_bytes": 1, "cpu_s": 1}'], [child.fileno()])
        assert zygote._answer()
        assert int(ours.recv(64)) == -errno.EAGAIN
        child.close()
        assert channel.recv(1) == b"", "the zygote has closed its copy"


LARGE = GrammarSpec(GrammarKind.LARK, "start: " + "|".join(f'"{i}x{i * 7}"' for i in range(14_000)), "guided_grammar")
"""Compiles in about a second; its process takes more than LITTLE_MIB for it."""
LITTLE_MIB = 8


def test_time_has_a_limit(tokenizer: Tokenizer) -> None:
    grammars = made(tokenizer, GrammarLimits(compile_s=1.0, process_mib=1024))
    try:
        with pytest.raises(InvalidRequestError, match=r"^guided_grammar: .* takes longer than 1 s"):
            grammars.check(slow_gbnf(1))
        grammars.check(regex("[a-z]+"))
        assert eventually(lambda: len(children_of(grammars)) == 1), "what was refused is gone"
    finally:
        grammars.close()


def policies_of(pid: int) -> list[tuple[int, int]]:
    """(scheduling policy, niceness) of each thread."""
    threads = map(int, os.listdir(f"/proc/{pid}/task"))
    return sorted((os.sched_getscheduler(tid), os.getpriority(os.PRIO_PROCESS, tid)) for tid in threads)


def test_compiling_takes_idle_time_and_steps_do_not(own: Grammars) -> None:
    waiting = own.begin_check(slow_gbnf(1))
    assert waiting is not None
    normal = (os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0))

    def is_so() -> bool:
        policies = [policies_of(child.pid) for child in children_of(own)]
        return any([normal, normal, (os.SCHED_IDLE, normal[1])] == policy for policy in policies)

    assert eventually(is_so)
    waiting.cancel()


def test_a_container_that_refuses_idle_time_gives_the_lowest_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with compiler_limits.low_priority_thread(is_idle=True) as thread:
        assert thread.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result() == 19


def test_a_starving_grammar_is_tried_at_a_low_priority(own: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "STARVING_SHARE", 100.0)
    monkeypatch.setattr(allowance, "STARVING_S", 0.0)
    waiting = own.begin_check(slow_gbnf(1))
    assert waiting is not None
    normal = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = [(os.SCHED_OTHER, niceness) for niceness in (normal, normal, max(normal, 10))]
    assert eventually(lambda: [policies_of(child.pid) for child in children_of(own)] == [wanted])
    waiting.cancel()


def test_a_machine_without_time_is_no_fault_of_the_grammar(
    own: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_queue, "PATIENCE", 0.0)
    monkeypatch.setattr(compile_queue, "LEVELS", ((compile_queue.INFINITY, 1.0, 1),))
    with pytest.raises(OverloadedError, match="too busy"):
        own.check(slow_gbnf(1))


@pytest.mark.parametrize(
    ("cpu_s", "wall_s", "outcome"),
    [
        (0.0, 0.0, 0.3),
        (0.2, 0.4, 0.1),
        (0.299, 0.4, allowance.SHORTEST_PAUSE_S),
        (0.3, 0.4, "slow"),
        (0.2, 1.5, "busy"),
        (0.005, 0.6, "starved"),
    ],
)
def test_cpu_time_is_limited_and_starving_is_noticed(cpu_s: float, wall_s: float, outcome: float | str) -> None:
    limit = allowance.Allowance(cpu_s=0.3, wall_s=1.5, is_idle=True)
    if isinstance(outcome, float):
        assert limit.pause_s(cpu_s, wall_s) == pytest.approx(outcome)
        return
    error = allowance.StarvedError if outcome == "starved" else allowance.TooSlowError
    with pytest.raises(error) as told:
        limit.pause_s(cpu_s, wall_s)
    assert getattr(told.value, "is_busy", None) == {"slow": False, "busy": True}.get(outcome)


def test_a_process_that_is_slow_to_end_holds_up_no_other(own: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [wire.STILL_ENDING, wire.STILL_ENDING, signal.SIGSEGV]
    monkeypatch.setattr(own.zygote, "_ask", lambda message: answers.pop(0))
    assert own.zygote.end(1, PATIENCE_S) == signal.SIGSEGV
    answers += [wire.STILL_ENDING] * 1000
    assert own.zygote.end(1, 0.0) is None


def test_memory_has_a_limit(tokenizer: Tokenizer) -> None:
    grammars = made(tokenizer, GrammarLimits(compile_s=PATIENCE_S, process_mib=LITTLE_MIB))
    try:
        with pytest.raises(InvalidRequestError, match=rf"^guided_grammar: .* (more than {LITTLE_MIB} MiB|too large)"):
            grammars.check(LARGE)
        grammars.check(regex("[a-z]+"))
        assert eventually(lambda: len(children_of(grammars)) == 1), "what was refused is gone"
    finally:
        grammars.close()


def test_slow_grammars_hold_up_no_quick_one(own: Grammars) -> None:
    hostile = [own.begin_check(slow_gbnf(i)) for i in range(8)]
    start = time.monotonic()
    own.check(regex("[a-z]+"))
    assert time.monotonic() - start < 9, "8 of them alone take more than 80 s"
    assert not all(future is not None and future.done() for future in hostile)
    assert len(children_of(own)) <= 5, "at most four compile at once"


def test_whoever_leaves_takes_the_compilation_along(own: Grammars) -> None:
    first, second = own.begin_check(slow_gbnf(1)), own.begin_check(slow_gbnf(1))
    assert first is not None
    assert second is not None
    assert eventually(lambda: len(children_of(own)) == 1), "two who want the same share a process"
    first.cancel()
    time.sleep(0.1)
    assert children_of(own)
    second.cancel()
    assert eventually(lambda: not children_of(own), 5)


def test_nothing_is_left_when_the_engine_closes(tokenizer: Tokenizer) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    threads, before = threading.active_count(), descriptors()
    grammars = made(tokenizer)
    for text in "abc":
        assert not masks_of(tokenizer, sequence(grammars, regex(text))).errors
    unfinished = grammars.begin_check(slow_gbnf(2))
    assert grammars.zygote.pid is not None
    family = [psutil.Process(grammars.zygote.pid), *children_of(grammars)]
    grammars.close()
    assert unfinished is not None
    assert unfinished.done()
    assert not any(process.is_running() for process in family)
    assert (threading.active_count(), descriptors()) == (threads, before)


def test_idle_processes_are_few(own: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "MAX_IDLE", 3)
    for i in range(8):
        own.check(regex(f"a{i}"))
    assert len(children_of(own)) <= 4
    statuses = [process.status() for process in children_of(own)]
    assert psutil.STATUS_ZOMBIE not in statuses


def test_a_grammar_in_use_outlives_many_idle_ones(
    own: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars_module, "MAX_IDLE", 2)
    running = sequence(own, regex("x+y"))
    assert not masks_of(tokenizer, running).errors
    for i in range(6):
        own.check(regex(f"b{i}"))
    assert not masks_of(tokenizer, running).errors


def test_kill_9_of_the_server_leaves_no_orphans() -> None:
    script = """
import sys, time
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.grammars.grammars import Grammars
from tests.grammars.hostile import slow_gbnf
tokenizer = Tokenizer.from_path("moe_serve/demo/model")
grammars = Grammars.of(tokenizer, tokenizer.vocab_size, frozenset(tokenizer.eos_token_ids))
grammars.check(GrammarSpec(GrammarKind.REGEX, "a+"))
waiting = grammars.begin_check(slow_gbnf(1))
print(grammars.zygote.pid, flush=True)
time.sleep(600)
"""
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environ, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        zygote = psutil.Process(int(server.stdout.readline()))
        assert eventually(lambda: len(zygote.children()) == 2), "one that is compiled, one that is being compiled"
        family = [zygote, *zygote.children()]
        server.kill()
        assert eventually(lambda: not any(process.is_running() for process in family), 10)
