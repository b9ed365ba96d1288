"""Tokenizers without a tokenizer.json: the ids are those of tiktoken, which Kimi's and Mistral's code call."""

from __future__ import annotations

import base64
import builtins
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import ConfigError
from moe_serve.text import tiktoken_file
from moe_serve.text.tokenizer import Tokenizer

tiktoken = pytest.importorskip("tiktoken", reason="the extra `tiktoken` is not installed")
WORDS = ("th", "the", " t", " the", "an", "ca", "cat", "Th", "The", "HT", "TP", "\u4f60", "\u4f60\u597d", "def", "  ")
TEXTS = ["the cat", "The  HTTPCat's 12345 n\u00efve\n\n", "\u4f60\u597dcat\U0001f469", "def f(x):\n    return the"]
TURN_END, CALL = "<|im_end|>", "<|tool_call_begin|>"
MISTRAL = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def ranks() -> dict[bytes, int]:
    """Bytes, then words, shorter ones first, so that each is two tokens of those before it."""
    pieces = [bytes([b]) for b in range(256)]
    for word in WORDS:
        spelt = word.encode()
        pieces += [spelt[:n] for n in range(2, len(spelt) + 1) if spelt[:n] not in pieces]
    return {piece: rank for rank, piece in enumerate(pieces)}


def write_tiktoken(folder: Path, code: str) -> Any:
    """A folder as Moonshot publishes it, and tiktoken's own encoder of it."""
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks().items()]
    (folder / tiktoken_file.NAME).write_text("".join(lines))
    special = {TURN_END: len(lines), CALL: len(lines) + 1}
    fields = {
        "added_tokens_decoder": {str(n): {"content": t, "special": t != CALL} for t, n in special.items()},
        "auto_map": {"AutoTokenizer": [code, None]},
        "tokenizer_class": "TikTokenTokenizer",
        "eos_token": TURN_END,
        "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    return tiktoken.Encoding("tiny", pat_str=tiktoken_file.MOONSHOT, mergeable_ranks=ranks(), special_tokens=special)


@pytest.mark.parametrize("module", ["tokenization_kimi", "tokenization_moonshot"])
def test_a_tiktoken_file_gives_tiktokens_ids(module: str, tmp_path: Path) -> None:
    own = write_tiktoken(tmp_path, f"{module}.TikTokenTokenizer")
    tokenizer = Tokenizer.from_path(str(tmp_path))
    for text in [*TEXTS, f"the{CALL}cat{TURN_END}"]:
        assert tokenizer.encode(text) == own.encode(text, allowed_special="all")
    assert tokenizer.vocab_size == own.n_vocab - 2 + tiktoken_file.RESERVED
    assert tokenizer.eos_token_ids == {own.n_vocab - 2}
    ids = tokenizer.render_chat([{"role": "user", "content": f"the{CALL}"}])
    assert ids == own.encode(f"the{CALL}{TURN_END}", allowed_special="all")
    assert tokenizer.decode(ids) == f"the{CALL}"  # what is not special is part of the answer
    assert [bytes(tokenizer.token_bytes(i)) for i in range(len(ranks()))] == list(ranks())


def test_a_template_file_wins_over_the_field(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, "tokenization_kimi.TikTokenTokenizer")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_path(str(tmp_path)).hf.chat_template == "file"


def write_tekken(folder: Path) -> Any:
    """A tekken.json, and the encoder that mistral-common makes of such a file: special tokens have the first ids."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    fields = {
        "config": {"pattern": MISTRAL, "default_vocab_size": len(ranks()) + 8, "default_num_special_tokens": 8},
        "special_tokens": [{"rank": n, "token_str": t, "is_control": True} for n, t in enumerate(special)],
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for piece, rank in ranks().items()
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return tiktoken.Encoding("tiny", pat_str=MISTRAL, mergeable_ranks=ranks(), special_tokens={})


def test_a_tekken_file_gives_tiktokens_ids_behind_its_special_tokens(tmp_path: Path) -> None:
    own = write_tekken(tmp_path)
    tokenizer = Tokenizer.from_path(str(tmp_path))
    for text in TEXTS:
        wanted = [8 + token for token in own.encode_ordinary(text)]
        assert tokenizer.encode(text) == [1, *wanted]
        assert tokenizer.decode(wanted) == text
    assert tokenizer.encode("[INST]the[/INST]", add_special_tokens=False)[::2] == [3, 4]
    assert tokenizer.eos_token_ids == {2}


def test_a_tekken_file_that_is_none_names_itself(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tekken\.json: cannot be read as a tekken file"):
        Tokenizer.from_path(str(tmp_path))


OWN_CODE = """
import base64
from pathlib import Path

import tiktoken
from transformers import PreTrainedTokenizer


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "own.tiktoken"}

    def __init__(self, vocab_file, **fields):
        lines = Path(vocab_file).read_text().splitlines()
        ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
        special = {"<|end|>": len(ranks), "<|pad|>": len(ranks) + 1}
        given = {"mergeable_ranks": ranks, "special_tokens": special}
        self.encoding = tiktoken.Encoding("own", pat_str=r"\\p{L}+|\\P{L}", **given)
        super().__init__(**fields)

    vocab_size = property(lambda self: self.encoding.n_vocab)

    def get_vocab(self):
        return {}

    def _tokenize(self, text, **fields):
        return [self.encoding.decode_single_token_bytes(i) for i in self.encoding.encode(text, allowed_special="all")]

    def _convert_token_to_id(self, token):
        known = {"<|end|>": self.encoding.n_vocab - 2}
        return known[token] if token in known else self.encoding.encode_single_token(token) + SHIFT
"""


def write_own_code(folder: Path, shift: int = 0) -> Any:
    """A tokenizer of a kind that nothing here names; `shift`: by how much its ids differ from its tiktoken's."""
    own = write_tiktoken(folder, "tokenization_own.OwnTokenizer")
    (folder / tiktoken_file.NAME).rename(folder / "own.tiktoken")
    code = OWN_CODE.replace("SHIFT", str(shift))
    (folder / "tokenization_own.py").write_text(code)
    fields = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "tokenizer_class": "OwnTokenizer"}))
    return own


def test_code_runs_only_where_it_is_trusted_and_never_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("it asks on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    write_own_code(folder)
    with pytest.raises(ConfigError, match="--trust-remote-code runs it"):
        Tokenizer.from_path(str(folder))
    with caplog.at_level(logging.WARNING, "moe_serve"):
        tokenizer = Tokenizer.from_path(str(folder), trust_remote_code=True)
    assert "runs now, with all rights of this user" in caplog.text
    encoding = tiktoken.Encoding("own", pat_str=r"\p{L}+|\P{L}", mergeable_ranks=ranks(), special_tokens={})
    assert all(tokenizer.encode(text) == encoding.encode_ordinary(text) for text in TEXTS)
    assert tokenizer.eos_token_ids == {len(ranks())}
    (folder / "tokenization_own.py").write_text("raise RuntimeError('no such thing')")
    with pytest.raises(ConfigError, match=r"own code fails .*no such thing"):
        Tokenizer.from_path(str(folder), trust_remote_code=True)


def test_code_that_makes_other_ids_than_its_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "shifted"
    folder.mkdir()
    write_own_code(folder, shift=1)
    with pytest.raises(ConfigError, match="makes other tokens"):
        Tokenizer.from_path(str(folder), trust_remote_code=True)
