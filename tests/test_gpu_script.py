"""benchmarks/gpu_10min.sh, which a lent GPU runs: its parts are those of docs/gpu.md, and all of them report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_10min.sh"
PARTS = dict(re.findall(r"^part (\w+) (\d+) ", SCRIPT.read_text(), flags=re.MULTILINE))
"""Name -> second of the run by which it ends; of a part of two commands, the later one."""


def test_the_page_and_the_header_name_every_part_and_its_end() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert dict(re.findall(r"^\| (\w+) \| (\d+) \|", page, flags=re.MULTILINE)) == PARTS
    assert dict(re.findall(r"^#   (\w+) (\d+)  ", SCRIPT.read_text(), flags=re.MULTILINE)) == PARTS


def test_parts_end_one_after_the_other_within_ten_minutes() -> None:
    ends = [int(end) for _, end in re.findall(r"^part (\w+) (\d+) ", SCRIPT.read_text(), flags=re.MULTILINE)]
    assert ends == sorted(ends)
    assert ends[-1] < 600


def simulate(out: Path, **environment: str) -> list[dict[str, Any]]:
    """The lines that the parts wrote."""
    command = ["bash", str(SCRIPT), "--simulate", str(out)]
    own = os.environ | {"PYTHON": sys.executable} | environment
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + log[-3000:]
    return [json.loads(line) for line in (out / "r.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here")
def test_every_part_reports_in_simulation(tmp_path: Path) -> None:
    lines = simulate(tmp_path)
    assert [line for line in lines if "error" in line] == []
    over = [line["part"] for line in lines if line.get("is_over")]
    assert list(dict.fromkeys(over)) == list(PARTS)
    told = [line["part"] for line in lines if "simulated" in line]
    assert set(told) == set(PARTS)
    assert all(line["simulated"] for line in lines if "simulated" in line)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here")
def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    """The interpreter named here is no Python."""
    with pytest.raises(AssertionError):
        simulate(tmp_path, PYTHON="false", PARTS="facts soak")
    over = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(line["part"], line["status"]) for line in over] == [("facts", 1), ("soak", 1)]
