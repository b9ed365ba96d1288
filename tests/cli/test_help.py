"""Help and mistakes answer at once: no command loads torch before it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from moe_serve.cli import main

COMMANDS = [[], ["serve"], ["generate"], ["chat"], ["bench"], ["bench", "serve"]]
HEAVY = {"torch", "transformers", "tokenizers", "numpy", "fastapi", "pydantic", "httpx", "uvicorn"}
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


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_names_its_flags_and_loads_nothing_heavy(command: list[str]) -> None:
    code = PROBE.format(argv=[*command, "--help"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, cpu_s = json.loads(done.stderr)
    assert done.stdout.startswith(f"usage: {' '.join(['moe-serve', *command])}")
    assert not HEAVY & set(modules)
    # CPU time, since the machine may be busy; about 0.1 s when it is not.
    assert cpu_s < 0.3


def test_the_listing_is_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE) == ["bench", "chat", "generate", "serve"]


def test_the_console_script_answers() -> None:
    code = "import sys; from moe_serve.cli import main; sys.exit(main(['--version']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"moe-serve \d+\.\d+\.\d+\n", done.stdout)
