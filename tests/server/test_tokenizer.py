"""Tokenizer: exact bytes of tokens, chat templates and their errors, folders that cannot be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_serve.errors import ConfigError, InvalidRequestError
from moe_serve.text.tokenizer import Tokenizer


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_bytes_of_tokens_concatenate_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert bytes(b for i in tokenizer.encode(text) for b in tokenizer.token_bytes(i)) == text.encode()


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    single = {tuple(b) for i in range(tokenizer.vocab_size) if len(b := tokenizer.token_bytes(i)) == 1}
    assert single == {(b,) for b in range(256)}


def test_unknown_id_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == []
    assert tokenizer.token_text(10**6) == ""


def test_added_tokens_are_not_read_as_byte_level(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_path(str(tokenizer_folder))
    tokenizer.hf.add_tokens(["é", "<end of text>"])
    tokenizer = Tokenizer(tokenizer.hf)
    for content in ("é", "<end of text>", "<eos>"):
        (token_id,) = tokenizer.encode(content)
        assert tokenizer.token_bytes(token_id) == list(content.encode())
        assert tokenizer.token_text(token_id) == content


def test_special_tokens_are_skipped_on_demand(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("lazy"), *tokenizer.eos_token_ids]
    assert tokenizer.decode(ids) == "lazy"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "lazy<eos>"


def test_conversation_goes_through_the_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.render_chat([{"role": "user", "content": "lazy dog"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>lazy dog\n<|assistant|>"
    ids = tokenizer.render_chat(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "lazy"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>a\n<|assistant|>lazy"


def with_template(folder: Path, tmp_path: Path, template: str) -> Tokenizer:
    (tmp_path / "template.jinja").write_text(template)
    return Tokenizer.from_path(str(folder), str(tmp_path / "template.jinja"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[5].content.x }}",
        "{{ 1 // 0 }}",
        "{{ messages + 1 }}",
        "{% for m in %}",
        "{{ messages.__class__.__mro__ }}{{ ''.x.y }}",
    ],
)
def test_template_that_refuses_is_an_error_of_the_messages(
    tokenizer_folder: Path, tmp_path: Path, template: str
) -> None:
    tokenizer = with_template(tokenizer_folder, tmp_path, template)
    with pytest.raises(InvalidRequestError) as error:
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "way", ["cycler.__init__.__globals__.os", "lipsum.__globals__['os']", "self.__init__.__globals__.__builtins__.open"]
)
def test_a_template_reaches_no_code(tokenizer_folder: Path, tmp_path: Path, way: str) -> None:
    """Templates come with checkpoints, GGUF files included, and those come from anyone."""
    tokenizer = with_template(tokenizer_folder, tmp_path, f"{{{{ {way}.mkdir('{tmp_path / 'ran'}') }}}}")
    with pytest.raises(InvalidRequestError, match=r"unsafe|undefined|access"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert not (tmp_path / "ran").exists()


def test_template_variables_reach_the_template_and_arguments_do_not(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = with_template(tokenizer_folder, tmp_path, "{{ mood }}")
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.decode(tokenizer.render_chat(messages, chat_template_kwargs={"mood": "lazy"})) == "lazy"
    for name in ("chat_template", "tokenize", "conversation"):
        with pytest.raises(InvalidRequestError) as error:
            tokenizer.render_chat(messages, chat_template_kwargs={name: "x"})
        assert error.value.param == "chat_template_kwargs"


def test_model_without_template_says_so(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.from_path(str(tmp_path)).render_chat([{"role": "user", "content": "x"}])


def test_folders_and_files_that_are_missing(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        Tokenizer.from_path(str(tmp_path))
    with pytest.raises(ConfigError, match="--chat-template"):
        Tokenizer.from_path(str(tokenizer_folder), str(tmp_path / "none.jinja"))
