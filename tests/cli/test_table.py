"""Tables for people, JSON for programs."""

from __future__ import annotations

import argparse
import math
import sys

import pytest

from moe_serve.cli.table import add_json_flag, number, print_json, table


def test_names_go_left_and_numbers_right() -> None:
    rows = [["policy", "hits %"], ["lru", "61.20"], ["belady", number(100.0)]]
    assert table(rows) == "policy  hits %\nlru      61.20\nbelady  100.00"
    assert table(rows, indent="  ").splitlines()[1] == "  lru      61.20"


def test_a_number_that_does_not_exist() -> None:
    assert (number(math.nan), number(0.125, 1), number(-2.0)) == ("-", "0.1", "-2.00")


@pytest.mark.parametrize(
    ("flags", "is_terminal", "shown"),
    [
        ([], False, True),
        ([], True, False),
        (["--json"], True, True),
    ],
)
def test_json_is_for_programs_or_on_request(
    flags: list[str],
    is_terminal: bool,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    add_json_flag(parser)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    print_json(parser.parse_args(flags), {"a": 1})
    assert capsys.readouterr().out == ('{"a": 1}\n' if shown else "")
