"""What the fuzzers share: a server over the random model, and a loop that fuzzes until its time is up."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from moe_serve.demo import MODEL
from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.server.app import create_app
from moe_serve.server.transport.connections import KEEP_ALIVE_S
from moe_serve.text.tokenizer import Tokenizer
from tests.random_model import random_engine

CHUNK = 1000
"""Examples in one Hypothesis run; each run has another seed."""


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_path(str(MODEL))


def random_app() -> FastAPI:
    """The whole server; only the forward pass is missing. A short context keeps the longest answers short."""
    tokenizer = demo_tokenizer()
    engine = random_engine(tokenizer, max_model_len=48, max_num_seqs=32)
    return create_app(AsyncEngine(engine), tokenizer, model_name="random")


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """A real uvicorn on a free port; gives its URL."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, ws="none", log_level="critical", timeout_graceful_shutdown=2, timeout_keep_alive=KEEP_ALIVE_S
        )
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def arguments() -> argparse.ArgumentParser:
    """The command line of a fuzzer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def fuzz_for_minutes(
    properties: dict[str, Callable[[int, int], int]],
    report: Callable[[], dict[str, Any]] = dict,
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """Run a fuzzer as its command line says. A property takes a seed and a number of examples, and returns how many it
    ran; `report` adds to what is printed.

    A failure ends it with Hypothesis' smallest example, or the seed; the last line of output is JSON.
    """
    args = (parser or arguments()).parse_args()
    counts = dict.fromkeys(properties, 0)
    start, seed = time.monotonic(), args.seed
    while time.monotonic() - start < args.minutes * 60:
        print(f"seed {seed}", file=sys.stderr, flush=True)
        for name, run in properties.items():
            counts[name] += run(seed, CHUNK)
        seed += 1
    minutes = round((time.monotonic() - start) / 60, 2)
    seeds = [args.seed, seed - 1]
    print(json.dumps({"minutes": minutes, "seeds": seeds, "examples": counts, "failures": 0, **report()}))
