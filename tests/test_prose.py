"""Documents and help texts keep the measurable rules of plain English (CONTRIBUTING.md).

Each rule is a function from text to the passages that break it, run on the documents and on planted violations.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_file_flags import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
LONGEST_SENTENCE = 40
"""Words."""
MOST_SENTENCES = 2
"""Of a help text that is longer than LONGEST_SENTENCE words."""
LOG = ROOT / "docs" / "log"
"""The log of experiments keeps what was written at the time."""
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*/*.md", "*/README.md", "moe_serve/*/README.md")
    for path in ROOT.glob(pattern)
    if LOG not in path.parents and not path.relative_to(ROOT).parts[0].startswith(".")
)
PERSON = re.compile(r"\b(?:nobody|whoever|somebody|anybody)(?:'s)?\b", re.IGNORECASE)
SO_MANY = re.compile(r"\bso many\b", re.IGNORECASE)


def riddles(text: str) -> list[str]:
    """Person words for things, and "so many" for a number."""
    return [found.group() for rule in (PERSON, SO_MANY) for found in rule.finditer(text)]


def paragraphs(markdown: str) -> Iterator[str]:
    """Prose of a document, one paragraph or list item at a time: no code, tables, headings or comments."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    in_list = False
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        starts_item = bool(lines) and re.match(r"\s*(?:[-*]|\d+\.) ", lines[0]) is not None
        in_list = starts_item or (in_list and block.startswith("  "))
        if not in_list and block.startswith("    "):  # code
            continue
        kept = [line for line in lines if not re.match(r"\s*(?:\||#)", line)]
        for item in re.split(r"\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(kept)):
            yield re.sub(r"^\s*(?:[-*]|\d+\.) ", "", item)


def sentences(prose: str) -> list[str]:
    """Split after . ? or ! and before a capital, a digit or `value: `; code in backticks is one word."""
    plain = re.sub(r"`[^`]*`", "X", " ".join(prose.split()))
    plain = re.sub(r"\]\([^)]*\)", "]", plain)
    return [part for part in re.split(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*\[]*(?:[A-Z0-9]|[\w-]+: ))", plain) if part]


def num_words(sentence: str) -> int:
    return len(re.findall(r"\w[\w'./-]*", sentence))


def long_sentences(markdown: str) -> list[str]:
    """Sentences of more than LONGEST_SENTENCE words."""
    parts = (sentence for prose in paragraphs(markdown) for sentence in sentences(prose))
    return [part for part in parts if num_words(part) > LONGEST_SENTENCE]


def wordy(help_text: str) -> bool:
    """More than two sentences and more than 40 words."""
    return len(sentences(help_text)) > MOST_SENTENCES and num_words(help_text) > LONGEST_SENTENCE


def help_texts() -> dict[str, str]:
    """ "command flag" -> its help, without the sentence about the default."""
    found = {}
    for words, parser in COMMANDS.items():
        for action in parser._actions:
            if action.help and action.help != argparse.SUPPRESS:
                name = action.option_strings[-1] if action.option_strings else action.dest
                found[f"{words} {name}"] = re.sub(r"\s*Default: [^ ].*$", "", action.help)
    return found


HELP = help_texts()


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_documents_name_things_and_numbers(path: Path) -> None:
    assert riddles(path.read_text()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_sentences_of_documents_are_short(path: Path) -> None:
    assert long_sentences(path.read_text()) == []


@pytest.mark.parametrize("flag", sorted(HELP))
def test_help_is_short_and_names_things_and_numbers(flag: str) -> None:
    assert riddles(HELP[flag]) == []
    assert long_sentences(HELP[flag]) == []
    assert not wordy(HELP[flag])


def test_the_rules_see_documents_and_help_texts() -> None:
    assert {"README.md", "SECURITY.md", "docs/architecture.md", "docs/glossary.md"} <= {relative(p) for p in DOCUMENTS}
    assert {"moe-serve serve --moe-cache-mib", "moe-serve bench serve --burstiness"} <= HELP.keys()
    assert len(list(paragraphs((ROOT / "docs" / "architecture.md").read_text()))) > 50


LONG = " ".join(["word"] * (LONGEST_SENTENCE + 1))
SHORT = " ".join(["Word"] + ["word"] * (LONGEST_SENTENCE - 1))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A page of nobody's.", ["nobody's"]),
        ("Whoever asks, and\nsomebody else.", ["Whoever", "somebody"]),
        ("Experts of so many layers", ["so many"]),
        ("No body of a request is read so often.", []),
    ],
)
def test_a_planted_riddle_is_found(text: str, found: list[str]) -> None:
    assert riddles(text) == found


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG}.",
        f"Short. {LONG}.",
        f"# Heading\n\n- {LONG}",
        f"1. Short.\n2. `code` {LONG}",
        f"1. Item.\n\n    Its second paragraph: {LONG}.",
        f"Two lines:\n{LONG}\n\n    code",
    ],
)
def test_a_planted_long_sentence_is_found(text: str) -> None:
    assert len(long_sentences(text)) == 1


@pytest.mark.parametrize(
    "text", [f"{SHORT}. {SHORT}.", f"    {LONG}", f"| {LONG} |", f"```\n{LONG}\n```", f"<!-- {LONG} -->", f"`{LONG}`"]
)
def test_code_tables_and_short_sentences_pass(text: str) -> None:
    assert long_sentences(text) == []


def test_a_planted_wordy_help_is_found() -> None:
    assert wordy(" ".join(["Fifteen words are in this one, and each of them counts for the limit here."] * 3))
    assert not wordy("One. Two. Three.")
