"""A scripted teacher: a function from the request's JSON to what an OpenAI-shaped server says, on a socket or not."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from omniopd.registry import TEACHERS
from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Message, Prompt
from teachers.openai import OpenAIConfig, OpenAITeacher

CANARY = "sk-CanaryKey-5f2d81c09a7e"


@dataclass
class Said:
    """One HTTP reply. `delay_s` comes before it; `promised` is a Content-Length that is larger than the body."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    delay_s: float = 0.0
    promised: int = 0

    @property
    def raw(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def choice(text: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}


def say(*texts: Any, finish: Any = "stop", usage: tuple[int, int] = (100, 10), **message: Any) -> Said:
    """A good reply with these texts."""
    prompt, completion = usage
    return Said(
        body={
            "model": "scripted-1",
            "choices": [choice(text, finish, **message) for text in texts],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
        }
    )


class Script:
    """Answers requests by a function (or one reply per call, in order) and remembers them."""

    def __init__(self, answer: Callable[[dict[str, Any]], Said] | list[Said]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.urls: list[str] = []
        self._queue = list(answer) if isinstance(answer, list) else None
        self._answer = answer if callable(answer) else None
        self._lock = threading.Lock()

    def __call__(self, raw: bytes, headers: dict[str, str], url: str = "") -> Said:
        body = json.loads(raw)
        with self._lock:
            self.urls.append(url)
            self.bodies.append(body)
            self.headers.append(headers)
            if self._queue is not None:
                return self._queue.pop(0) if len(self._queue) > 1 else self._queue[0]
        assert self._answer is not None
        return self._answer(body)

    @property
    def calls(self) -> int:
        return len(self.bodies)

    def mock(self) -> httpx.MockTransport:
        def handle(request: httpx.Request) -> httpx.Response:
            said = self(request.content, dict(request.headers), str(request.url))
            return httpx.Response(said.status, content=said.raw, headers={"content-type": said.kind, **said.headers})

        return httpx.MockTransport(handle)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The script on a loopback socket; yields the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            said = script(raw, dict(self.headers))
            time.sleep(said.delay_s)
            try:
                self.send_response(said.status)
                self.send_header("Content-Type", said.kind)
                self.send_header("Content-Length", str(max(len(said.raw), said.promised)))
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said.raw)
            except OSError:
                pass  # the client has gone

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def prompt(name: str = "p", text: str = "What is 6 times 7?") -> Prompt:
    return Prompt(name, (Message("user", text),))


PREFIX = "Let us multiply six by seven, step by step. First, six times five is"


def continue_query(
    prefix: str = PREFIX, n: int = 4, row: int = 0, start: int = 10, seed: int = 100, text: str = " AUDITED-SPAN"
) -> ContinueQuery:
    chunk = Chunk(row, start, start + 8, prefix, text, (len(text),) * 8)
    return ContinueQuery(prompt(), chunk, n, 16, seed)


def answer_query(n: int = 2, row: int = 0, seed: int = 7) -> AnswerQuery:
    return AnswerQuery(prompt(), row, n, 64, seed)


class Bench:
    """Builds teachers over a store in a temporary folder; waits are noted, not slept."""

    CANARY, PREFIX = CANARY, PREFIX
    Said, Script = Said, Script
    say, choice, serving = staticmethod(say), staticmethod(choice), staticmethod(serving)
    prompt, continue_query, answer_query = (
        staticmethod(prompt),
        staticmethod(continue_query),
        staticmethod(answer_query),
    )

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.sqlite"
        self.store = Store(self.path)
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await asyncio.sleep(0)

    def teacher(self, script: Script | None = None, **settings: Any) -> OpenAITeacher:
        config = OpenAIConfig(
            **{
                "model": "scripted",
                "base_url": "http://127.0.0.1:9/v1",
                "api_key_env": "OMNI_TEST_KEY",
                "continuation": "prefill",
                **settings,
            }
        )
        return OpenAITeacher(config, self.store, http=script.mock() if script else None, sleep=self.sleep)

    def make(self, kind: str, script: Script | None = None, **settings: Any) -> Any:
        """A teacher of any type behind HTTP, made from its settings as a config would."""
        component = TEACHERS.get(kind)
        config = component.Config(**{"type": kind, "model": "scripted", "api_key_env": "OMNI_TEST_KEY", **settings})
        return component(config, self.store, http=script.mock() if script else None, sleep=self.sleep)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("OMNI_TEST_KEY", CANARY)
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()
