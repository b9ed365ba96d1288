"""A flag that names a file is of use only to users who can make that file: a command makes it, or a page says how.

The flags are found in the parsers themselves, so that a new one without a source fails here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_serve.cli
from moe_serve.cli.commands import Parser, find_commands

DOCS = Path(__file__).parents[2] / "docs"
NAMES_A_FILE = re.compile(
    r"\bfiles?\b|\bfolder\b|\.npz|\.jsonl?\b|\btraces?\b|\brecordings?\b|placement made", re.IGNORECASE
)
WRITTEN = "an output"
CHECKPOINT = "a model's folder"
BY_HAND = "a text file; the flag's help says what stands in it"
SETTINGS = {
    "--chat-template": BY_HAND,
    "--tokenizer": CHECKPOINT,
    "--moe-cache-profile": "moe-serve trace",
    "--moe-predictor": "moe-serve predictor train",
    "--moe-expert-file": "moe-serve pack",
    "--expert-plan": "moe-serve plan",
    "--ep-predictor": "moe-serve predictor tokens",
    "--api-key-file": BY_HAND,
    "--recording-dir": WRITTEN,
    "--prefix-cache-dir": WRITTEN,
}
"""Flags of serve, generate and others that load a model."""
SOURCES = {
    **SETTINGS,
    "model": CHECKPOINT,
    "--model": CHECKPOINT,
    "--config": "moe-serve serve",  # with --print-config
    "trace": "moe-serve trace",
    "traces": "moe-serve trace",
    "--trace": "moe-serve trace",
    "--profile": "moe-serve trace",
    "plan": "moe-serve plan",
    "old": "moe-serve plan",
    "new": "moe-serve plan",
    "--prompts": BY_HAND,
    "input": BY_HAND,
    "--dataset-path": BY_HAND,
    "--calibration": BY_HAND,
    "file": WRITTEN,
    "--output": WRITTEN,
    "--out": WRITTEN,
    "--steps": WRITTEN,
    "--html": WRITTEN,
    "--png": WRITTEN,
    "--sglang": WRITTEN,
    "--eplb": WRITTEN,
    "--json": WRITTEN,
    "--plot": WRITTEN,
    "--result-dir": WRITTEN,
}
"""Where each comes from; a command of ours is a source too."""


def commands(package: str, path: list[str], prefix: str = "moe-serve") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command without commands of its own, by its words."""
    for name, command in find_commands(package, path).items():
        words = f"{prefix} {name}"
        if folder := getattr(command, "__path__", None):
            yield from commands(command.__name__, folder, words)  # type: ignore[attr-defined]
        else:
            parser = Parser(prog=words)
            command.add_arguments(parser, [name])
            yield words, parser


COMMANDS = dict(commands(moe_serve.cli.__name__, moe_serve.cli.__path__))


def takes_a_file(action: argparse.Action) -> bool:
    if action.type is Path:
        return True
    is_text = action.nargs != 0 and not action.choices and action.type in (None, str)
    return is_text and bool(NAMES_A_FILE.search(action.help or ""))


def file_flags() -> Iterator[tuple[str, str]]:
    """(command, flag or argument)"""
    for words, parser in COMMANDS.items():
        for action in parser._actions:
            if takes_a_file(action):
                yield words, action.option_strings[-1] if action.option_strings else action.dest


NO_FILES = {"--api-key", "--served-model-name", "--otlp-traces-endpoint"}
"""Their help has one of the words, and they take something else."""
FLAGS = sorted({flag for _, flag in file_flags()} - NO_FILES)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_file_has_a_source(flag: str) -> None:
    assert flag in SOURCES, f"{flag} names a file: say in SOURCES which command makes it"
    source = SOURCES[flag]
    if not source.startswith("moe-serve "):
        return
    assert any(words == source or words.startswith(source + " ") for words in COMMANDS), f"there is no {source}"
    assert [page for page in DOCS.rglob("*.md") if source in page.read_text()], f"no page of docs/ shows {source}"


@pytest.mark.parametrize("flag", [flag for flag, source in SETTINGS.items() if source.startswith("moe-serve ")])
def test_a_page_has_both_the_setting_and_what_makes_its_file(flag: str) -> None:
    pages = [page.read_text() for page in DOCS.glob("*.md")]
    assert [page for page in pages if f"{flag} " in page and SETTINGS[flag] in page]


def test_no_source_is_left_over() -> None:
    assert sorted(SOURCES.keys() - set(FLAGS)) == []
