"""Recording the routing of live traffic, under SGLang's paths.

    POST /start_expert_distribution_record   {"weights": bool, "token_ids": bool}, or no body
    POST /stop_expert_distribution_record
    POST /dump_expert_distribution_record    writes a .npz into --recording-dir and forgets what was recorded

The file's name is ours, never the client's. Token ids are text: they are kept only when asked for. Knows FastAPI and
AsyncEngine; what a recording is, moe_serve/expert_routes/route_recorder.py says.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.errors import InvalidRequestError
from moe_serve.expert_routes.route_recorder import RouteRecorder
from moe_serve.hf.checkpoint import checkpoint_fingerprint
from moe_serve.server.endpoints.bodies.given import TheService, parsed
from moe_serve.server.endpoints.bodies.parsing import Body

router = APIRouter()


class RecordingBody(Body):
    """POST /start_expert_distribution_record."""

    weights: bool = False
    """Keep the routers' weights: three times the memory."""
    token_ids: bool = False
    """Keep the tokens themselves."""

    may_be_absent: ClassVar[bool] = True


class Recording:
    """At most one recording at a time. Its methods run on the event loop; the engine's part on the engine's thread."""

    def __init__(self, engine: AsyncEngine, folder: Path | None, buffer_tokens: int, meta: dict[str, Any]) -> None:
        self._engine = engine
        self._folder = folder
        self._buffer_tokens = buffer_tokens
        self._meta = meta
        self._recorder: RouteRecorder | None = None
        self._is_running = False

    async def start(self, body: RecordingBody) -> dict[str, Any]:
        """Begin with an empty buffer. InvalidRequestError while another recording runs."""
        if self._folder is None:
            raise InvalidRequestError("recording", "this server was started without --recording-dir")
        if self._is_running:
            raise InvalidRequestError("recording", "a recording is running; stop it first")
        self._is_running = True
        shape = self._engine.core.routing_shape()
        recorder = self._recorder = RouteRecorder(shape, self._buffer_tokens, body.weights, body.token_ids)
        await self._engine.call(lambda: self._engine.core.observe_routes(recorder))
        return {"recording": True, "buffer_tokens": self._buffer_tokens}

    async def stop(self) -> dict[str, Any]:
        """Record no more; what was recorded stays until it is dumped or another recording starts."""
        recorder = self._existing()
        self._is_running = False
        await self._engine.call(lambda: self._engine.core.observe_routes(recorder, wanted=False))
        return {"recording": False, "tokens": recorder.num_tokens}

    async def dump(self) -> dict[str, Any]:
        """Write what was recorded; a recording that runs goes on with an empty buffer."""
        recorder = self._existing()
        assert self._folder is not None
        if self._is_running:
            following = await self._engine.call(lambda: self._exchange(recorder))
        else:
            following = None
        self._recorder = following
        name = f"expert_distribution_{time.time_ns() // 1_000_000}.npz"
        return await asyncio.to_thread(self._write, recorder, self._folder / name)

    def _exchange(self, recorder: RouteRecorder) -> RouteRecorder:
        """On the engine's thread: a fresh recorder in the place of `recorder`, which then stands still."""
        following = recorder.successor()
        self._engine.core.observe_routes(recorder, wanted=False)
        self._engine.core.observe_routes(following)
        return following

    def _write(self, recorder: RouteRecorder, path: Path) -> dict[str, Any]:
        meta = dict(self._meta)
        if meta["path"]:
            meta["fingerprint"] = checkpoint_fingerprint(meta["path"])
        trace = recorder.trace(meta)
        try:
            trace.save(path)
        except OSError as error:
            raise InvalidRequestError("recording", f"cannot write into --recording-dir ({error.strerror})") from error
        return {"file": path.name, "tokens": trace.num_tokens, "sequences": trace.num_sequences}

    def _existing(self) -> RouteRecorder:
        if self._recorder is None:
            raise InvalidRequestError("recording", "there is no recording; start one first")
        return self._recorder


def add(app: FastAPI, service: TheService) -> None:
    """The routes, and the one recording that they share."""
    meta = {"model": service.model_name, "path": service.model_path}
    app.state.recording = Recording(service.engine, service.recording_dir, service.recording_buffer_tokens, meta)
    app.include_router(router)


async def _recording_of(http: HttpRequest) -> Recording:
    recording: Recording = http.app.state.recording
    return recording


TheRecording = Annotated[Recording, Depends(_recording_of)]


@router.post("/start_expert_distribution_record")
async def start(
    body: Annotated[RecordingBody, Depends(parsed(RecordingBody))], recording: TheRecording
) -> dict[str, Any]:
    """Record which experts live traffic takes, from now on."""
    return await recording.start(body)


@router.post("/stop_expert_distribution_record")
async def stop(recording: TheRecording) -> dict[str, Any]:
    """Record no more; what was recorded is kept."""
    return await recording.stop()


@router.post("/dump_expert_distribution_record")
async def dump(recording: TheRecording) -> dict[str, Any]:
    """Write what was recorded as a routing trace into --recording-dir, and forget it."""
    return await recording.dump()
