"""Recording over HTTP and by `moe-serve trace`: files that replay and plan can read, with nothing missing or twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from moe_serve.cli import main
from moe_serve.cli.prompt_files import read_prompts
from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.errors import ConfigError
from moe_serve.hf.checkpoint import checkpoint_fingerprint
from moe_serve.server.app import create_app
from predictors import trace

from .references import Reference
from .serving import load

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]
START, STOP, DUMP = (f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump"))
Call = tuple[str, dict[str, Any] | None]


def talk(checkpoint: Path, recording_dir: Path | None, *calls: Call) -> list[httpx.Response]:
    """One POST after the other to a server of a tiny model."""

    async def run() -> list[httpx.Response]:
        llm = load(checkpoint, enable_prefix_caching=False)
        app = create_app(
            AsyncEngine(llm.engine),
            llm.tokenizer,
            model_name="tiny",
            model_path=str(checkpoint),
            recording_dir=str(recording_dir) if recording_dir else None,
            recording_buffer_tokens=500,
            ranks=llm.ranks,
        )
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return [
                    await client.post(path, json=body) if body is not None else await client.post(path)
                    for path, body in calls
                ]

    return asyncio.run(run())


def complete(prompt: tuple[int, ...]) -> Call:
    return "/v1/completions", {"prompt": list(prompt), "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def test_start_dump_stop_dump(checkpoint: Checkpoint, reference: References, tmp_path: Path) -> None:
    folder, ref = checkpoint("mixtral"), reference("mixtral")
    before, during, later = ref.prompts[2], ref.prompts[3], ref.prompts[1]
    answers = talk(
        folder, tmp_path,
        complete(before), (START, {"token_ids": True, "weights": True}), (START, None), complete(during), (DUMP, None),
        complete(later), (STOP, None), complete(before), (DUMP, None), (DUMP, None),
    )  # fmt: skip
    assert [a.status_code for a in answers] == [200, 200, 400, 200, 200, 200, 200, 200, 200, 400]
    assert answers[2].json()["error"]["param"] == "recording"
    first, second = (trace.load(tmp_path / answers[i].json()["file"]) for i in (4, 8))
    assert first.num_tokens == answers[4].json()["tokens"] == len(during) + 3
    assert second.num_tokens == answers[6].json()["tokens"] == len(later) + 3
    assert first.meta["fingerprint"] == checkpoint_fingerprint(str(folder))
    assert first.token_ids is not None
    assert first.token_ids.tolist() == [*during, *ref.outputs[3][:3]]
    assert first.weights is not None


def test_without_a_folder_recording_is_refused(checkpoint: Checkpoint) -> None:
    (answer,) = talk(checkpoint("mixtral"), None, (START, None))
    assert answer.status_code == 400
    assert "--recording-dir" in answer.json()["error"]["message"]


def test_a_path_from_the_client_is_an_unknown_field(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (answer,) = talk(checkpoint("mixtral"), tmp_path, (START, {"path": "/tmp/elsewhere.npz"}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "path"


def test_trace_command_feeds_replay_and_plan(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"turns": [text]}) for text in ("One two", "Three", "Four five six")))
    path = tmp_path / "trace.npz"
    flags = ["--max-tokens", "5", "--ignore-eos", "--max-model-len", "64", "--num-kv-pages", "64", "--dtype", "float32"]
    assert main(["trace", str(checkpoint("mixtral")), "--prompts", str(prompts), "-o", str(path), *flags]) == 0
    found = trace.load(path)
    assert np.diff(found.seq_offsets).tolist() == [len(text) + 4 for text in ("One two", "Three", "Four five six")]
    assert found.token_ids is not None
    assert len(set(found.token_ids[:7].tolist())) == len(set("One two"))
    assert main(["replay", str(path), "--policies", "lru"]) == 0
    plan = ["--gpus", "2", "--time-limit", "2", "--quiet", "--output", str(tmp_path / "plan.json")]
    assert main(["plan", "solve", str(path), *plan]) == 0
    assert "lru" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": 5}', "entry 1 of .* has no text"),
        ("a.json", '{"prompt": "x"}', "holds no list"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.jsonl", "nonsense", "is not JSON"),
    ],
)
def test_bad_prompt_files_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)
