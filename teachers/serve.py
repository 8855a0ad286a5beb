"""A small server that makes a closed teacher out of local weights: text in, text out, in OpenAI's chat shape.

It answers `POST /v1/chat/completions` with `n`, `seed`, `temperature`, `top_p`, `max_tokens`, and goes on from an open
assistant turn (`continue_final_message: true`, as vLLM spells it). It gives no log-probs: whoever asks for them is
refused, as the closed APIs do. What waits while the model is busy forms the next batch, see `engine.py`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

from omniopd.chat import ChatTemplate
from omniopd.errors import TeacherError
from omniopd.sampling import Request
from omniopd.types import Message, Role
from teachers.engine import Drawn, Engine
from teachers.transformers import TransformersEngine


class Turn(BaseModel):
    """One message of a request."""

    role: Role
    content: str


class ChatRequest(BaseModel):
    """The fields that are honoured. Others are ignored unless they ask for something that can't be had."""

    model_config = ConfigDict(extra="allow")
    messages: list[Turn] = Field(min_length=1)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = None
    logprobs: bool = False
    stream: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def application(engine: Engine, name: str) -> Starlette:
    """The ASGI application around one model, which answers by that name to whoever asks."""

    async def chat(http: HttpRequest) -> JSONResponse:
        try:
            asked = ChatRequest.model_validate_json(await http.body())
            if asked.logprobs or asked.stream:
                return _refuse("logprobs and stream are not offered: this teacher returns text only")
            if not (asked.add_generation_prompt or asked.continue_final_message):
                return _refuse("add_generation_prompt: false is offered only with continue_final_message: true")
            request = engine.request(
                [Message(turn.role, turn.content) for turn in asked.messages],
                open_turn=asked.continue_final_message,
                draws=asked.n,
                max_tokens=asked.max_tokens,
                seed=asked.seed,
                temperature=asked.temperature,
                top_p=asked.top_p,
            )
        except ValidationError as error:
            first = error.errors()[0]
            return _refuse(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")
        except ValueError as error:
            return _refuse(f"messages: {error}")
        try:
            drawn = await http.app.state.worker.draw(request)
        except TeacherError as error:
            return JSONResponse({"error": {"message": str(error), "type": "server_error"}}, status_code=500)
        return JSONResponse(_completion(engine, name, request, drawn))

    async def models(http: HttpRequest) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with engine.worker() as app.state.worker:
            yield

    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]
    return Starlette(routes=routes, lifespan=lifespan)


def _refuse(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)


def _completion(engine: Engine, name: str, request: Request, drawn: list[Drawn]) -> dict[str, Any]:
    read, written = len(request.prompt_ids), sum(len(one.ids) for one in drawn)
    return {
        "id": f"chatcmpl-{time.time_ns():x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": engine.text(request, one)},
                "finish_reason": one.finish,
            }
            for i, one in enumerate(drawn)
        ],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def serve(model_path: str, *, host: str = "127.0.0.1", port: int = 8000, name: str | None = None) -> None:
    """Serve until interrupted; port 0 takes a free one. The line that says where is printed once it listens.

    Raises:
        TeacherError: the model can't be loaded, or the port is taken.
    """
    import uvicorn

    chat = ChatTemplate.load(model_path, "model", TeacherError)
    engine = TransformersEngine.load(model_path, chat, field="model", error=TeacherError)
    name = name or Path(model_path).name
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise TeacherError(f"--port {port}: {error.strerror or error}; choose another, or 0 for any free one") from None
    server = uvicorn.Server(uvicorn.Config(application(engine, name), log_level="warning", backlog=2048))

    def announce() -> None:
        while not server.started:
            time.sleep(0.02)
        print(f"serving {name} (text only) at http://{host}:{listener.getsockname()[1]}/v1", flush=True)

    threading.Thread(target=announce, daemon=True).start()
    server.run(sockets=[listener])
