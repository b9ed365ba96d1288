"""`moe-serve launch AGENT`: start a coding agent against a running server, or against a new one."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_serve.cli.agents import AGENTS, NO_KEY, Served, environment_of
from moe_serve.errors import ConfigError, MoEServeError
from moe_serve.loadtest.api_key import add_key_flag, key_of

HELP = "Start a coding agent (claude, codex, opencode, aider) with this server as its model."
USAGE = "AGENT [--url URL | --model MODEL | --config FILE] [-- arguments of the agent]"
EXAMPLES = (
    "moe-serve launch claude --url http://127.0.0.1:8000",
    "moe-serve launch codex --model Qwen/Qwen3-30B-A3B -- exec 'say hello'",
    "eval $(moe-serve launch aider --url http://127.0.0.1:8000 --print-env)",
)
PASSES_ON = True
POLL_S = 0.2
LAST_LINES = 5
"""Of a server's log, shown when it did not start."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("agent", metavar="AGENT", choices=AGENTS, help=f"One of {', '.join(AGENTS)}.")
    parser.set_defaults(rest=[])
    parser.add_argument("--url", help="Use the server at this address. Default: a new one, which ends with the agent.")
    parser.add_argument("--model", metavar="MODEL", help="Without --url: what to serve. Default: the demo model.")
    parser.add_argument("--config", metavar="FILE", help="Without --url: settings of the server, as in serve --config.")
    parser.add_argument(
        "--print-env", action="store_true", help="Print what would be set, for a shell to read, and start nothing."
    )
    add_key_flag(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    program = shutil.which(args.agent)
    if program is None and not args.print_env:
        raise ConfigError(f"{args.agent} is not installed here; `{AGENTS[args.agent].install}` installs it")
    key = key_of(args.api_key) or NO_KEY
    if args.url:
        return _start(args, program, _ask(args.url.rstrip("/").removesuffix("/v1"), key))
    with _new_server(args) as url:
        return _start(args, program, _ask(url, key))


def _check(args: argparse.Namespace) -> None:
    for name in ("model", "config"):
        if args.url and getattr(args, name):
            raise ConfigError(f"--{name} has no effect with --url: that server has a model and settings of its own")
    if args.print_env and not args.url:
        raise ConfigError("--print-env needs --url: the address of a running server")


def _start(args: argparse.Namespace, program: str | None, served: Served) -> int:
    """Run the agent to its end; its exit status."""
    agent = AGENTS[args.agent]
    environment = environment_of(agent, served)
    words = [*agent.arguments(served), *args.rest]
    if args.print_env:
        _print(args.agent, environment, words)
        return 0
    assert program is not None
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is the agent's
    try:
        return subprocess.call([program, *words], env={**os.environ, **environment})
    finally:
        signal.signal(signal.SIGINT, before)


def _print(name: str, environment: Mapping[str, str], words: Sequence[str]) -> None:
    for variable, value in environment.items():
        print(f"export {variable}={shlex.quote(value)}")
    print(f"# then: {shlex.join([name, *words])}")


def _ask(url: str, key: str) -> Served:
    """The model of a server. MoEServeError where it cannot be reached or does not answer."""
    import httpx

    try:
        answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=30)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise MoEServeError(f"--url: cannot talk to {url} ({error}); is `moe-serve serve` running there?") from error
    if answer.status_code != 200:
        raise MoEServeError(f"{url}/v1/models answers {answer.status_code}: {answer.text[:200]}")
    card = answer.json()["data"][0]
    return Served(url, str(card["id"]), int(card.get("max_model_len") or 0), key)


@contextmanager
def _new_server(args: argparse.Namespace) -> Iterator[str]:
    """The address of a server that ends with this block. Its log is a file, because the screen is the agent's."""
    port = _free_port()
    words = [*([args.model] if args.model else []), "--port", str(port)]
    words += ["--config", args.config] if args.config else []
    descriptor, log = tempfile.mkstemp(prefix="moe-serve-", suffix=".log")
    command = [sys.executable, "-m", "moe_serve", "serve", *words]
    # A session of its own: the terminal's Ctrl-C is for the agent.
    process = subprocess.Popen(command, stdout=descriptor, stderr=descriptor, start_new_session=True)
    os.close(descriptor)
    url = f"http://127.0.0.1:{port}"
    print(f"moe-serve: starting a server at {url}; its log is {log}", file=sys.stderr, flush=True)
    try:
        _wait_until_ready(process, url, Path(log))
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    raise MoEServeError(f"the server did not start:\n{last}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
