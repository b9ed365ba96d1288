"""`moe-serve chat [MODEL] | --url URL`: talk to a model in the terminal, or pipe questions in by line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from moe_serve.cli import preflight
from moe_serve.cli.flags import OF_SERVER, add_config_flags, add_model_argument, config_from_args, given
from moe_serve.cli.sampling import HELP_OF, add_sampling_flags, sampling_from_args
from moe_serve.config import EngineConfig
from moe_serve.config.settings import refuse_no_effect, settings_of
from moe_serve.errors import ConfigError, MoEServeError
from moe_serve.loadtest.api_key import add_key_flag, headers_of
from moe_serve.loadtest.openai_stream import parse_line, reply_error, text_of

if TYPE_CHECKING:
    import httpx

HELP = "Chat with a model in the terminal, in this process or on a server."
USAGE = "[MODEL] [flags]"
EXAMPLES = (
    "moe-serve chat MODEL --temperature 0.7",
    "moe-serve chat --url http://127.0.0.1:8000          # the key comes from MOE_SERVE_API_KEY",
)
EXTRA_ARGUMENT = "start the chat first, then type the question"
Message = dict[str, str]


class Backend(Protocol):
    """A model that answers conversations."""

    def reply(self, messages: list[Message]) -> Generator[str, None, None]:
        """Pieces of the answer as they come. Closing the generator stops the answer."""
        ...

    def close(self) -> None: ...


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--url", help="Chat with the OpenAI-compatible server at this address instead of loading MODEL."
    )
    parser.add_argument(
        "--served-model-name", metavar="TEXT", help="With --url: which model. Default: the server's first."
    )
    add_key_flag(parser)
    parser.add_argument("--system", metavar="TEXT", help="System prompt.")
    add_sampling_flags(parser)
    add_config_flags(parser, EngineConfig, skip=OF_SERVER)


def run(args: argparse.Namespace) -> int:
    backend: Backend = Remote(args) if args.url else Local(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    if sys.stdin.isatty():
        print("/reset starts over, /exit leaves.", file=sys.stderr)
    with closing(backend):
        return converse(backend, opening)


def converse(backend: Backend, opening: list[Message]) -> int:
    """Until /exit or the end of input. A failed answer is reported, forgotten, and makes the status 1."""
    messages, status = list(opening), 0
    while (line := _next_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(opening)
        elif line:
            status |= _turn(backend, messages, line)
    return status


def _next_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _turn(backend: Backend, messages: list[Message], line: str) -> int:
    """One question and its answer, both added to `messages` unless the answer failed."""
    question = {"role": "user", "content": line}
    try:
        answer = _print_reply(backend.reply([*messages, question]))
    except MoEServeError as error:
        print(f"moe-serve: error: {error.message}", file=sys.stderr)
        return 1
    messages += [question, {"role": "assistant", "content": answer}]
    return 0


def _print_reply(reply: Generator[str, None, None]) -> str:
    """Show pieces as they come; Ctrl-C stops the answer and keeps the part that was shown."""
    said: list[str] = []
    try:
        with suppress(KeyboardInterrupt), closing(reply):
            for piece in reply:
                print(piece, end="", flush=True)
                said.append(piece)
    finally:
        print()
    return "".join(said)


class Local:
    """The model in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = config_from_args(args, EngineConfig)
        refuse_no_effect(config)
        config = preflight.check_engine(config)
        self._params = sampling_from_args(args, config)
        preflight.say_importing()
        from moe_serve.llm import LLM

        self._llm = LLM(**vars(config))

    def reply(self, messages: list[Message]) -> Generator[str, None, None]:
        for output in self._llm.stream(self._llm.render_chat(messages), self._params):
            yield output.text

    def close(self) -> None:
        """The model goes with the process."""


class Remote:
    """A model behind an OpenAI-compatible server. Only flags that are given are sent."""

    def __init__(self, args: argparse.Namespace) -> None:
        import httpx

        _refuse_local_flags(args)
        base_url = args.url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(
            base_url=base_url, timeout=httpx.Timeout(10, read=None), headers=headers_of(args.api_key)
        )
        self._settings = given(args, [*HELP_OF, "stop"])
        self._model: str | None = args.served_model_name

    def close(self) -> None:
        self._client.close()

    def _first_model(self) -> str:
        with _connection_errors():
            response = self._client.get("/v1/models")
        if response.status_code != 200:
            raise reply_error(response.status_code, response.text)
        return str(response.json()["data"][0]["id"])

    def reply(self, messages: list[Message]) -> Generator[str, None, None]:
        self._model = self._model or self._first_model()
        body = {"model": self._model, "messages": messages, "stream": True, **self._settings}
        with _connection_errors(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise reply_error(response.status_code, response.read().decode(errors="replace"))
            yield from _texts(response)


def _refuse_local_flags(args: argparse.Namespace) -> None:
    """ConfigError on a flag that only a model in this process would read."""
    for setting in settings_of(EngineConfig):
        if setting.name != "model" and hasattr(args, setting.name):
            raise ConfigError(f"{setting.flag} has no effect with --url: the server has settings of its own")


def _texts(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        event = parse_line(line)
        text = text_of(event) if event else None
        if text:
            yield text


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Turns httpx's transport errors into one of ours, with a message for people."""
    import httpx

    try:
        yield
    except httpx.TransportError as error:
        raise MoEServeError(f"cannot talk to the server: {error}") from error
