"""A fake engine that needs no model, a tiny byte-level BPE tokenizer, and apps and servers made of them."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from expert_cache.report import ExpertReport, ExpertTotals, Residency
from moe_serve.cli.flags import default_model
from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.engine.engine import Engine
from moe_serve.engine.trouble import Trouble
from moe_serve.errors import ContextTooLongError, InvalidRequestError, MoEServeError
from moe_serve.expert_routes.route_recorder import RouteObserver
from moe_serve.grammars.grammars import Grammars
from moe_serve.scheduling.finish import FinishedStats, FinishReason
from moe_serve.scheduling.sequence import Request, SampleOutput, TokenLogprob
from moe_serve.scheduling.stats import EngineLoad, StatsObserver, StepStats
from moe_serve.server.app import create_app
from moe_serve.server.transport.guard import guard
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer
from predictors.predictor import RouterShape
from predictors.shape import MoELayer
from tests.patience import PATIENCE_S
from tests.server.scripted_model import HERMES, PLAIN_TEMPLATE, Model, start

MODEL = "fake-model"
SENTENCE = "The quick brown fox jumps over the lazy dog. Grüße, 你好 🙂! "
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(eq=False)
class Sample:
    """One running sample of the fake engine."""

    request: Request
    index: int
    detokenizer: IncrementalDetokenizer
    generated: int = 0
    done: bool = False


def expert_report(num_steps: int) -> ExpertReport:
    """Two layers of four experts, numbered 1 and 3: what so many equal steps leave behind."""
    counts = {
        **{f.name: np.zeros(2, np.int64) for f in fields(ExpertTotals)},
        "hits": np.array([2, 4]) * num_steps,
        "misses": np.array([2, 0]) * num_steps,
        "demand_bytes": np.array([1000, 0]) * num_steps,
        "stall_s": np.array([0.5, 0.0]) * num_steps,
        "predicted_used": np.array([0, 3]) * num_steps,
        "predicted_unused": np.array([0, 2]) * num_steps,
        "unpredicted": np.array([0, 1]) * num_steps,
    }
    ready = np.array([[True, True, False, False], [True, True, True, True]])
    unused = np.array([[False] * 4, [False, False, False, True]])
    residency = Residency(ready, unused, "device", "disk", 6, 512, 3072, 1000 * num_steps, 0.5 * num_steps)
    tokens = np.array([[4, 0, 0, 0], [1, 1, 1, 1]]) * num_steps
    return ExpertReport((1, 3), 500, tokens, counts, residency, {"lru": 9}, 0.25)


@dataclass(eq=False)
class FakeEngine:
    """An EngineLike. Token k of sample i is token (k + i) of SENTENCE, again and again."""

    tokenizer: Tokenizer
    config: EngineConfig = field(default_factory=EngineConfig)
    observer: StatsObserver | None = None
    max_model_len: int = 512
    num_pages: int = 64
    page_size: int = 16
    delay_s: float = 0.0
    failing_steps: int = 0
    breaks_after: tuple[int, MoEServeError] | None = None
    """Each sample ends with this error after so many tokens."""
    """So many of the next steps with work raise."""
    refuse_add: bool = False
    refuse_abort: bool = False
    expert_cache_mib: int | None = None
    is_closed: bool = False
    route_observers: list[RouteObserver] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    paused: set[str] = field(default_factory=set)
    waiting: list[Sample] = field(default_factory=list)
    running: list[Sample] = field(default_factory=list)
    num_steps: int = 0
    experts: Callable[[int], ExpertReport | None] = expert_report
    """What to report after so many steps."""
    gate: threading.Event = field(default_factory=threading.Event)
    """Steps wait for it; open unless a test closes it."""

    def __post_init__(self) -> None:
        self.ids = self.tokenizer.encode(SENTENCE)
        self.gate.set()
        self.grammars = Grammars.of(self.tokenizer, self.tokenizer.vocab_size, frozenset(self.tokenizer.eos_token_ids))

    def check_request(self, request: Request) -> None:
        if (compiling := self.begin_check(request)) is not None:
            compiling.result()

    def begin_check(self, request: Request) -> Future[Any] | None:
        vocab = self.tokenizer.vocab_size
        if not request.prompt_token_ids:
            raise InvalidRequestError("prompt", "the prompt is empty")
        if any(not 0 <= t < vocab for t in request.prompt_token_ids):
            raise InvalidRequestError("prompt", "token id outside the vocabulary")
        if any(t >= vocab for t in request.params.logit_bias):
            raise InvalidRequestError("logit_bias", "token id outside the vocabulary")
        if len(request.prompt_token_ids) + (request.params.max_tokens or 1) > self.max_model_len:
            raise ContextTooLongError("prompt", "the prompt is too long")
        grammar = request.params.grammar
        return None if grammar is None else self.grammars.begin_check(grammar)

    def add_request(self, request: Request) -> None:
        if self.refuse_add:
            self.refuse_add = False
            raise RuntimeError("no room")
        for i in range(request.params.n):
            self.waiting.append(Sample(request, i, IncrementalDetokenizer(self.tokenizer, request.params)))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.waiting = [s for s in self.waiting if s.request.request_id != request_id]
        self.running = [s for s in self.running if s.request.request_id != request_id]
        if self.refuse_abort:
            raise RuntimeError("cannot abort")

    def pause(self, request_id: str, is_paused: bool) -> None:
        self.paused = self.paused - {request_id} | ({request_id} if is_paused else set())

    def is_waiting(self, request_id: str) -> bool:
        return any(s.request.request_id == request_id for s in self.waiting)

    def has_work(self) -> bool:
        return bool(self.waiting) or any(s.request.request_id not in self.paused for s in self.running)

    def resize_expert_cache(self, moe_cache_mib: int) -> None:
        if moe_cache_mib > 100:
            raise InvalidRequestError("mib", "more than there is")
        self.expert_cache_mib = moe_cache_mib

    def expert_report(self) -> ExpertReport | None:
        return self.experts(self.num_steps)

    def routing_shape(self) -> RouterShape:
        return RouterShape((MoELayer(1), MoELayer(3)), num_experts=4, top_k=2)

    def observe_routes(self, observer: RouteObserver, wanted: bool = True) -> None:
        """There are no routes to tell of."""
        others = [known for known in self.route_observers if known is not observer]
        self.route_observers = [*others, observer] if wanted else others

    def trouble(self) -> Trouble | None:
        return None

    def close(self) -> None:
        self.is_closed = True
        self.grammars.close()

    def fail_running(self, message: str) -> list[SampleOutput]:
        failed, self.running = self.running, []
        return [self._output(s, "", (), FinishReason.ERROR, None, MoEServeError(message)) for s in failed]

    def step(self) -> list[SampleOutput]:
        self.gate.wait()
        if self.delay_s:
            time.sleep(self.delay_s)
        admitted = self.waiting[: self.config.max_num_seqs - len(self.running)]
        del self.waiting[: len(admitted)]
        self.running += admitted
        if self.failing_steps:
            self.failing_steps -= 1
            raise RuntimeError("the step failed")
        outputs = [self._advance(s) for s in self.running if s.request.request_id not in self.paused]
        self._report(admitted)
        self.running = [s for s in self.running if not s.done]
        return outputs

    def _advance(self, sample: Sample) -> SampleOutput:
        params = sample.request.params
        if self.breaks_after is not None and sample.generated >= self.breaks_after[0]:
            sample.done = True
            return self._output(sample, "", (), FinishReason.ERROR, None, self.breaks_after[1])
        token_id = self.ids[(sample.generated + sample.index) % len(self.ids)]
        sample.generated += 1
        text, stop = sample.detokenizer.push([token_id])
        limit = params.max_tokens or self.max_model_len - len(sample.request.prompt_token_ids)
        reason = None
        if stop is not None:
            reason = FinishReason.STOP
        elif sample.generated >= limit:
            reason = FinishReason.LENGTH
            text += sample.detokenizer.flush()
        if reason is not None:
            sample.done = True
            self.finished.append(sample.request.request_id)
        return self._output(sample, text, (token_id,), reason, stop)

    def _output(
        self,
        sample: Sample,
        text: str,
        token_ids: tuple[int, ...],
        reason: FinishReason | None,
        stop: str | None,
        error: MoEServeError | None = None,
    ) -> SampleOutput:
        count = sample.request.params.logprobs
        logprobs: tuple[TokenLogprob, ...] = ()
        if count is not None:
            top = tuple((t, -0.5 - i if i < 2 else float("-inf")) for i, t in enumerate(range(count)))
            logprobs = tuple(TokenLogprob(t, -0.25, top) for t in token_ids)
        num_prompt = len(sample.request.prompt_token_ids)
        return SampleOutput(
            sample.request.request_id,
            sample.index,
            text,
            token_ids,
            logprobs,
            reason,
            stop,
            num_prompt,
            num_prompt // 2,
            sample.generated,
            error,
            text_starts=(sample.detokenizer.token_start,) * len(logprobs),
        )

    def _report(self, admitted: list[Sample]) -> None:
        if self.observer is None:
            return
        prompt = sum(len(s.request.prompt_token_ids) for s in admitted)
        count = len(self.running)
        experts = ExpertTotals(hits=6, misses=2, demand_bytes=1000, stall_s=0.5)
        self.num_steps += 1
        self.observer.on_step(StepStats(0.01, prompt, count, 0, prompt, prompt // 2, (0.01,), (0.1,), experts))
        self.observer.on_load(EngineLoad(count, len(self.waiting), 0.5))
        for s in self.running:
            if s.done:
                num_prompt, reason = len(s.request.prompt_token_ids), FinishReason.LENGTH
                self.observer.on_finished(
                    FinishedStats(reason, num_prompt, s.generated, s.request.params.max_tokens, 1, 0.4, 0.1, 0.1, 0.2)
                )


def train_byte_level(folder: Path) -> Path:
    """A checkpoint folder that holds only a byte-level BPE tokenizer with a chat template."""
    backend = FastTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SENTENCE.split(" Gr")[0]] * 4, trainer)  # other characters are several tokens
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_path(str(tokenizer_folder))


@dataclass
class Served:
    """An app with its engine, and what tests do with them."""

    engine: FakeEngine
    app: FastAPI
    async_engine: AsyncEngine

    @asynccontextmanager
    async def running(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of the running app, without sockets."""
        async with self.app.router.lifespan_context(self.app):
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client

    def fail_after_a_step(self) -> None:
        """Each step that gives outputs is the last one before a failure."""
        step = self.engine.step

        def failing() -> Any:
            outputs = step()
            self.engine.failing_steps = 1
            return outputs

        self.engine.step = failing  # type: ignore[method-assign]

    def talk(self, *posts: tuple[str, Any]) -> list[httpx.Response]:
        """Run the app for these posts, one after the other. A path alone is a GET; bytes go as they are."""

        async def run() -> list[httpx.Response]:
            async with self.running() as client:
                return [await self._send(client, path, body) for path, body in posts]

        return asyncio.run(run())

    @staticmethod
    async def _send(client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
        if body is None:
            return await client.get(path)
        if isinstance(body, bytes):
            return await client.post(path, content=body)
        return await client.post(path, json=body)

    def post(self, path: str, **body: Any) -> Any:
        """JSON of one good answer."""
        response = self.talk((path, body))[0]
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of one good streamed answer, [DONE] checked and dropped."""
        response = self.talk((path, {**body, "stream": True}))[0]
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return sse_chunks(response.text)


def sse_chunks(text: str) -> list[dict[str, Any]]:
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], text[-200:]
    assert all(e.startswith("data: ") for e in events[:-1])
    return [json.loads(e.removeprefix("data: "), parse_constant=pytest.fail) for e in events[:-2]]


Make = Callable[..., Served]


@pytest.fixture(scope="session")
def make(tokenizer: Tokenizer) -> Make:
    """Build a Served; keyword arguments are FakeEngine's fields, and those of create_app after `app_`."""

    def build(**values: Any) -> Served:
        app_values = {k.removeprefix("app_"): values.pop(k) for k in list(values) if k.startswith("app_")}
        engine = FakeEngine(tokenizer, **values)
        async_engine = AsyncEngine(engine)
        app = create_app(async_engine, tokenizer, model_name=MODEL, version="1.2.3", **app_values)
        return Served(engine, app, async_engine)

    return build


@pytest.fixture
def served(make: Make) -> Served:
    return make()


@contextmanager
def live_server(app: Any) -> Iterator[str]:
    """A real uvicorn on a free port; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="critical", timeout_graceful_shutdown=2))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def serve() -> Callable[[FastAPI], AbstractContextManager[str]]:
    return live_server


@pytest.fixture
def live(served: Served) -> Iterator[str]:
    with live_server(served.app) as url:
        yield url


@pytest.fixture
def sse() -> Callable[[str], list[dict[str, Any]]]:
    return sse_chunks


@pytest.fixture
def sentence() -> str:
    return SENTENCE


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait until something is true; fails after PATIENCE_S."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.005)

    return wait


@pytest.fixture
def hermes(tokenizer_folder: Path, tmp_path: Path) -> Iterator[Model]:
    """Text that the test writes, through a chat template with tools."""
    yield from start(tokenizer_folder, tmp_path, HERMES)


@pytest.fixture
def bare(tokenizer_folder: Path, tmp_path: Path) -> Iterator[Model]:
    """The same through one without."""
    yield from start(tokenizer_folder, tmp_path, PLAIN_TEMPLATE)


@pytest.fixture
def claude(hermes: Model) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client of the scripted model."""
    url = str(hermes.client.base_url).removesuffix("/v1/")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """A server of the demo model: weights, template and tokenizer are real. Greedy, so that answers do not vary."""
    settings = {"model": default_model(), "num_kv_pages": 512, "num_threads": 1, "device": "cpu"}
    engine = Engine.from_config(EngineConfig.from_dict(settings))
    greedy = {"temperature": 0.0}
    app = create_app(AsyncEngine(engine), engine.tokenizer, model_name="gpt-5.2", sampling_defaults=greedy)
    with live_server(guard(app, ServerConfig(), frozenset())) as url:
        yield url
