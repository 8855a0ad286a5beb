"""A small server that makes a closed teacher out of local weights: text in, text out, in OpenAI's chat shape.

It answers `POST /v1/chat/completions` with `n`, `seed`, `temperature`, `top_p`, `max_tokens`, and goes on from an open
assistant turn (`add_generation_prompt: false, continue_final_message: true`, as vLLM spells it). It gives no log-probs:
whoever asks for them is refused, as the closed APIs do. Requests that wait while the model is busy form the next batch.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from omniopd.errors import TeacherError
from omniopd.sampling import Draw, Request, sample

GATHER_SECONDS = 0.01  # how long an idle server waits for company before it starts a batch
MAX_ROWS = 1024


class ChatRequest(BaseModel):
    """The fields that are honoured. Others are ignored unless they ask for something that can't be had."""

    model_config = ConfigDict(extra="allow")
    messages: list[dict[str, Any]] = Field(min_length=1)
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


@dataclass
class _Waiting:
    request: Request
    answer: asyncio.Future[list[Draw]]


class TextModel:
    """Local weights behind a queue; one batch at a time runs in a thread of its own."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        ends = model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id
        self.end_ids = set(ends) if isinstance(ends, list) else {ends}
        self.queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._fresh_seed = time.time_ns()

    @classmethod
    def load(cls, path: str, name: str | None = None) -> TextModel:
        """Load a model folder or hub id.

        Raises:
            TeacherError: it is no causal language model with a tokenizer and a chat template.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForCausalLM.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"{path}: can't be loaded as a causal language model: {str(error).splitlines()[0]}"
            ) from None
        if not tokenizer.chat_template:
            raise TeacherError(f"{path}: its tokenizer has no chat template; add one to tokenizer_config.json")
        if torch.cuda.is_available():
            model = model.to("cuda")
        return cls(model, tokenizer, name or Path(path).name)

    def render(self, chat: ChatRequest) -> list[int]:
        """Prompt ids by the model's own template; a template that writes its own BOS gets no second one.

        Raises:
            ValueError: the template refuses these messages, or they leave no room in the context.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"messages: {error}") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= self.context:
            raise ValueError(f"messages: {len(ids)} tokens do not fit the context of {self.context}")
        return ids

    async def draw(self, chat: ChatRequest, ids: list[int]) -> list[Draw]:
        self._fresh_seed += 1
        request = Request(
            prompt_ids=tuple(ids),
            seed=self._fresh_seed if chat.seed is None else chat.seed,
            max_new_tokens=min(chat.max_tokens, self.context - len(ids)),
            draws=chat.n,
            temperature=chat.temperature,
            top_p=chat.top_p,
        )
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        await self.queue.put(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Serve the queue for ever: what has gathered while the last batch ran is the next batch."""
        while True:
            batch = [await self.queue.get()]
            await asyncio.sleep(GATHER_SECONDS)
            while not self.queue.empty() and sum(w.request.draws for w in batch) < MAX_ROWS:
                batch.append(self.queue.get_nowait())
            try:
                drawn = await asyncio.to_thread(sample, self.model, [w.request for w in batch], self.end_ids)
            except Exception as error:  # one bad batch must not end the server
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(RuntimeError(f"sampling failed: {error}"))
                continue
            for waiting, draws in zip(batch, drawn, strict=True):
                if not waiting.answer.done():  # its client may be gone
                    waiting.answer.set_result(draws)

    def text_after(self, ids: list[int], draw: Draw) -> str:
        """The drawn text as it reads after the prompt: some tokenizers drop a leading space when decoding alone."""
        before = ids[-4:]
        whole = self.tokenizer.decode([*before, *draw.ids], skip_special_tokens=True)
        return str(whole)[len(self.tokenizer.decode(before, skip_special_tokens=True)) :]


def application(text_model: TextModel) -> Starlette:
    """The ASGI application around one model."""

    async def chat(http: HttpRequest) -> JSONResponse:
        try:
            request = ChatRequest.model_validate_json(await http.body())
            if request.logprobs or request.stream:
                return _refuse("logprobs and stream are not offered: this teacher returns text only")
            ids = text_model.render(request)
        except ValidationError as error:
            first = error.errors()[0]
            return _refuse(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")
        except ValueError as error:
            return _refuse(str(error))
        try:
            draws = await text_model.draw(request, ids)
        except RuntimeError as error:
            return JSONResponse({"error": {"message": str(error), "type": "server_error"}}, status_code=500)
        return JSONResponse(_completion(text_model, ids, draws))

    async def models(http: HttpRequest) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": text_model.name, "object": "model"}]})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(text_model.run())
        yield
        worker.cancel()

    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]
    return Starlette(routes=routes, lifespan=lifespan)


def _refuse(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)


def _completion(text_model: TextModel, ids: list[int], draws: list[Draw]) -> dict[str, Any]:
    written = sum(len(draw.ids) for draw in draws)
    return {
        "id": f"chatcmpl-{time.time_ns():x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": text_model.name,
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": text_model.text_after(ids, draw)},
                "finish_reason": draw.finish,
            }
            for i, draw in enumerate(draws)
        ],
        "usage": {"prompt_tokens": len(ids), "completion_tokens": written, "total_tokens": len(ids) + written},
    }


def serve(model_path: str, *, host: str = "127.0.0.1", port: int = 8000, name: str | None = None) -> None:
    """Serve until interrupted; port 0 takes a free one. The line that says where is printed once it listens.

    Raises:
        TeacherError: the model can't be loaded, or the port is taken.
    """
    import uvicorn

    text_model = TextModel.load(model_path, name)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise TeacherError(f"--port {port}: {error.strerror or error}; choose another, or 0 for any free one") from None
    server = uvicorn.Server(uvicorn.Config(application(text_model), log_level="warning", backlog=2048))

    def announce() -> None:
        while not server.started:
            time.sleep(0.02)
        print(f"serving {text_model.name} (text only) at http://{host}:{listener.getsockname()[1]}/v1", flush=True)

    threading.Thread(target=announce, daemon=True).start()
    server.run(sockets=[listener])
