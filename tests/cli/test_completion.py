"""`moe-serve completion`: the scripts know every command and its flags."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from moe_serve.cli import main


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_script_knows_commands_and_flags(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("serve", "launch", "--moe-cache-mib", "--print-config", "solve"))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_another_shell_is_refused() -> None:
    with pytest.raises(SystemExit):
        main(["completion", "cmd"])
