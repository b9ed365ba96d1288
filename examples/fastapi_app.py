"""A model inside your own FastAPI application: one endpoint that answers, one that streams.

.venv/bin/python examples/fastapi_app.py            # then: curl -d '{"text": "Hello!"}' http://127.0.0.1:8009/answer
"""

import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.responses import StreamingResponse

from moe_serve import AsyncLLM, SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
Text = Annotated[str, Body(embed=True)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncLLM(sys.argv[1] if len(sys.argv) > 1 else str(DEMO), max_model_len=256) as llm:
        app.state.llm = llm
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/answer")
async def answer(request: Request, text: Text) -> dict[str, str]:
    params = SamplingParams(temperature=0, max_tokens=32)
    result = await request.app.state.llm.chat([{"role": "user", "content": text}], params)
    return {"text": result.outputs[0].text}


@app.post("/stream")
async def stream(request: Request, text: Text) -> StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        async with aclosing(
            request.app.state.llm.stream(text, SamplingParams(temperature=0, max_tokens=32))
        ) as outputs:
            async for output in outputs:
                yield output.text

    return StreamingResponse(pieces(), media_type="text/plain")


if __name__ == "__main__":
    uvicorn.run(app, port=8009)
