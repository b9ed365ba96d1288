"""docs/quickstart.md as a new user would go through it: every command, and what it prints.

Commands are the lines after `$`, continued by `>`. The lines below are their output, in which `...` stands for
anything. A section is one shell. Its ports are replaced by free ones.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_serve.cli import parse

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "quickstart.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)[^\n]*\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
TIMEOUT_S = 600
END = "-- end of a command --"


@dataclass(frozen=True)
class Step:
    """A command and what the page says that it prints."""

    command: str
    output: str


def steps(section: str) -> list[Step]:
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", SECTIONS[section], flags=re.MULTILINE | re.DOTALL))
    found = []
    for text in re.split(r"^\$ ", blocks, flags=re.MULTILINE)[1:]:
        first, *rest = text.splitlines()
        more = [line[2:] for line in rest if line.startswith("> ")]
        output = [line for line in rest if not line.startswith("> ")]
        found.append(Step("\n".join([first, *more]), "\n".join(output).strip("\n")))
    return found


def matches(said: str, printed: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in said.split("..."))
    return re.fullmatch(pattern, printed.strip("\n"), flags=re.DOTALL) is not None


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def script(section: str) -> str:
    """All commands, each followed by END, its errors and END. Servers in the background keep their log."""
    lines = ["trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT"]
    for step in steps(section):
        command = f"{{ {step.command}\n}} 2> step.log"
        if step.command.endswith(" &"):
            command = f"{step.command.removesuffix(' &')} > server.log 2>&1 &\n: > step.log"
        lines.append(f"{command}\necho '{END}'\ncat step.log\necho '{END}'")
    return "\n".join(lines)


def test_every_section_has_commands() -> None:
    assert list(SECTIONS) == ["Install", "Hobbyist", "Operator", "Planner", "Developer"]
    assert all(len(steps(section)) >= 2 for section in list(SECTIONS)[1:])


def test_what_is_said_is_compared_with_what_is_printed() -> None:
    assert matches("a ... c\n...", "a b c\nd\ne")
    assert not matches("a ... c", "a b d")
    assert not matches("a", "a b")
    assert steps("Developer")[0].command.count("\n") > 2


@pytest.mark.parametrize("section", list(SECTIONS)[1:])
def test_our_commands_and_flags_exist(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("serve.yaml").write_text("port: 1\n")
    for step in steps(section):
        for command in re.findall(r"(?:^|[=\w]+ )moe-serve ([^|>&]+)", step.command):
            parse(shlex.split(command))


@pytest.mark.slow
@pytest.mark.parametrize("section", list(SECTIONS)[1:])
def test_it_prints_what_the_page_says(section: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, start in (("python", ""), ("moe-serve", "-m moe_serve ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {start}"$@"\n')
        (programs / name).chmod(0o755)
    text, ports = script(section), {port: free_port() for port in ("8000", "8001")}
    if section == "Developer":  # its trace is the planner's
        text = f"{steps('Planner')[0].command}\n{steps('Planner')[1].command} > trace.log 2>&1\n{text}"
    for port, free in ports.items():
        text = text.replace(port, free)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": python_path()}
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    for port, free in ports.items():
        done.stdout = done.stdout.replace(free, port)
    *outputs, _ = done.stdout.split(f"{END}\n")
    for step, output, errors in zip(steps(section), outputs[::2], outputs[1::2], strict=True):
        assert matches(step.output, output or errors), f"$ {step.command}\n{output}\n{errors[-3000:]}"


def python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
