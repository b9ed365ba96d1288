"""Help and mistakes answer at once: no command loads torch before it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from moe_serve.cli import main
from tests.patience import on_a_quiet_moment

# The most CPU time help may take, in seconds; CPU time, since the machine may be busy. Typical: 0.1.
COMMANDS = {
    "": 0.3,
    "serve": 0.3,
    "generate": 0.3,
    "chat": 0.3,
    "batch": 0.3,
    "bench": 1.0,
    "bench serve": 1.0,
    "pack": 0.3,
    "plan": 0.5,
    "plan watch": 0.5,
    "replay": 0.3,
    "tune": 0.3,
    "launch": 0.3,
    "scale": 0.3,
    "completion": 0.3,
}
HEAVY = {"torch", "transformers", "tokenizers", "numpy", "matplotlib", "fastapi", "pydantic", "httpx", "uvicorn"}
PROBE = """
import json, sys, time
start = time.process_time()
from moe_serve.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print(json.dumps([sorted(sys.modules), time.process_time() - start]), file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_loads_nothing_heavy(command: str) -> None:
    on_a_quiet_moment(lambda: check_help(command))


def check_help(command: str) -> None:
    code = PROBE.format(argv=[*command.split(), "--help"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, cpu_s = json.loads(done.stderr)
    assert done.stdout.startswith(f"usage: moe-serve {command}".rstrip())
    assert not HEAVY & set(modules)
    timed = re.findall(r"(--[\w-]+) S\b", done.stdout)
    assert [flag for flag in timed if not flag.endswith("-s")] == [], "a time flag has its unit in its name"
    assert cpu_s < COMMANDS[command]


def test_the_listing_is_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\w+)(?= |$)", capsys.readouterr().out, re.MULTILINE)
    assert listed == [
        *("batch", "bench", "chat", "completion", "doctor", "generate", "launch", "pack", "plan", "predictor"),
        *("quantize", "replay", "scale", "serve", "trace", "tune"),
    ]


def test_the_console_script_answers() -> None:
    code = "import sys; from moe_serve.cli import main; sys.exit(main(['--version']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"moe-serve \d+\.\d+\.\d+\n", done.stdout)
