"""A chat server that does on purpose what real ones do rarely: refuse, stall, break off, and answer nonsense.

    with FaultServer(FaultSettings(faults=0.3, seed=7)) as server:     # in a thread of the test
        httpx.post(f"{server.url}/chat/completions", json=...)
        server.counts, server.log, server.most_in_flight

    FaultServer(script=["429", "reset", "ok"])                         # these three first, in order of arrival

    python tests/faults.py --faults 0.3 --latency 1 --limit 64 --seed 7 --log FILE     # a process of its own

What a request meets is drawn from a hash of the seed, its body and how often that very body came before: a retry
usually meets another fate, and a run repeats whatever the order of arrival. Raw sockets under asyncio, because no HTTP
library lets its user reset a connection in the middle of a body.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TextIO

# The faults by what is wrong. A client may cure all but the last group by asking again.
STATUS = {"429": 429, "429_bare": 429, "500": 500, "503": 503, "529": 529}  # `bare`: without Retry-After
WIRE = ("hang", "drip", "reset", "reset_midway", "short")  # the reply is good, its way over the wire is not
BODIES = ("truncated", "malformed", "html", "no_choices", "null_choices", "error_in_200")  # whole replies of no use
TEXTS = ("no_finish", "empty", "refusal", "restart", "duplicates", "fewer")  # well formed, but poor evidence
KINDS = (*STATUS, *WIRE, *BODIES, *TEXTS)
GROUPS: dict[str, tuple[str, ...]] = {"status": tuple(STATUS), "wire": WIRE, "bodies": BODIES, "texts": TEXTS}

REFUSAL = "I'm sorry, but I can't help with that."
PAGE = "<!doctype html><html><title>Just a moment...</title><body>The origin is being checked. {}</body></html>"

# A partial solution is an open assistant turn, or stands between marks inside the last turn.
_BEGUN = re.compile(r"<begun>\n?(.*?)\n?</begun>", re.DOTALL)
_LAST_PIECE = re.compile(r"<last_piece>(.*?)</last_piece>", re.DOTALL)
_COUNTING = re.compile(r"(\d+),\s*$")

_TOKEN_CHARS = 4
_MOST_BODY = 64 * 2**20
_MOST_CHOICES = 1024
_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {529: "Overloaded"}


@dataclass(frozen=True)
class FaultSettings:
    """What the server does. Every field is a flag of the program too.

    Faults: `faults` is the share of requests that meet one, `kinds` the weights they are drawn by (a request that can't
    meet a kind, such as `fewer` for n = 1, draws among the rest), `seed` decides who meets which. `retry_after` is what
    a 429 asks to wait; `hang_s` and `drip_s` are how long a reply is kept back, or dripped; `echo_key` says the
    Authorization header back in every error.

    Load: `latency` seconds and up to `jitter` more before each reply but a 429; above `limit` requests under way, or
    `rpm` in any 60 s, the answer is 429 at once (0: no limit), with Retry-After if `limit_says_when`.

    Texts: `n_honoured` off gives one choice whatever n; `refusal_rate` and `restart_rate` are shares of draws, and
    `duplicate_rate` of replies whose choices are all equal. Asking again changes nothing about them. A draw is its
    messages, `seed + index` and, if `place_counts`, its index in the reply: without, a draw is the same whether it
    comes alone or among others. `finish` is the finish_reason of a good choice.

    Usage: with `cache`, prompts seen before are remembered and the longest common prefix is told as cached tokens, in
    steps of `cache_step` and only from `cache_least` up.
    """

    faults: float = 0.0
    kinds: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    seed: int = 0
    retry_after: float = 0.05
    hang_s: float = 30.0
    drip_s: float = 30.0
    echo_key: bool = False
    latency: float = 0.0
    jitter: float = 0.0
    limit: int = 0
    limit_says_when: bool = True
    rpm: int = 0
    n_honoured: bool = True
    refusal_rate: float = 0.0
    restart_rate: float = 0.0
    duplicate_rate: float = 0.0
    place_counts: bool = True
    finish: str = "length"
    cache: bool = False
    cache_step: int = 16
    cache_least: int = 0
    model: str = "faulty-1"

    def __post_init__(self) -> None:
        if unknown := sorted(self.kinds.keys() - set(KINDS)):
            raise ValueError(f"no such fault: {', '.join(unknown)}; there are {', '.join(KINDS)}")
        for name in ("faults", "refusal_rate", "restart_rate", "duplicate_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, not {getattr(self, name)}")


def weigh(text: str) -> dict[str, float]:
    """Weights from a list of kinds and groups: `status,wire,hang=0.2` (a later one overrides)."""
    weights: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition("=")
        weights |= dict.fromkeys(GROUPS.get(name, (name,)), float(weight or 1))
    return weights


def digest(*parts: Any) -> str:
    """A hash of anything JSON holds. ASCII, because a student's text may hold lone surrogates."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()


def unit(*parts: Any) -> float:
    """A number from 0 to 1 that looks random and is fixed by the parts."""
    return int(digest(*parts)[:13], 16) / 16**13


def tokens(text: str) -> int:
    """How many tokens a text is counted as."""
    return math.ceil(len(text) / _TOKEN_CHARS)


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for. `body` is the hash of all that was sent, `ask` of (messages, seed, n, max_tokens)."""

    body: str
    ask: str
    messages: str
    prompt: str
    partial: str
    echo: str
    seed: int | None
    n: int
    max_tokens: int | None

    @classmethod
    def read(cls, raw: bytes) -> Request:
        """Read a request's body.

        Raises:
            ValueError: it is no chat request, or asks for what is not offered.
        """
        sent = json.loads(raw)
        messages = sent.get("messages") if isinstance(sent, dict) else None
        if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
            raise ValueError("messages must be a list of turns")
        if sent.get("stream"):
            raise ValueError("stream is not offered")
        n, seed = sent.get("n") or 1, sent.get("seed")
        limit = sent.get("max_tokens") or sent.get("max_completion_tokens")
        if not all(isinstance(number, int) for number in (n, limit or 1, seed or 0)):
            raise ValueError("n, seed and the token limit must be whole numbers")
        if not 1 <= n <= _MOST_CHOICES or (limit or 1) < 1:
            raise ValueError(f"n must be from 1 to {_MOST_CHOICES}, the token limit from 1 up")
        partial, echo = _partial(messages[-1])
        return cls(
            body=hashlib.sha256(raw).hexdigest(),
            ask=digest(messages, seed, n, limit),
            messages=digest(messages),
            # Opening marks alone, so that a turn that has grown still begins with what it was.
            prompt="".join(f"<|{turn.get('role')}|>{_text(turn)}" for turn in messages),
            partial=partial,
            echo=echo,
            seed=seed,
            n=n,
            max_tokens=limit,
        )


def _text(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    return content if isinstance(content, str) else json.dumps(content)


def _partial(turn: Mapping[str, Any]) -> tuple[str, str]:
    """The partial solution that is to be gone on with, and the piece of it that the reply is asked to open with."""
    text = _text(turn)
    if turn.get("role") == "assistant":
        return text, ""
    begun, piece = _BEGUN.search(text), _LAST_PIECE.search(text)
    return begun[1] if begun else "", piece[1] if piece else ""


@dataclass(frozen=True, slots=True)
class Visit:
    """One arrival. `ask` is the hash of the bytes where they are no chat request."""

    ask: str
    attempt: int
    arrived: float
    request: Request | None


@dataclass(frozen=True)
class Entry:
    """One line of the log, written before the reply is sent: the provider's side of the bill.

    `request` is the hash of (messages, seed, n, max_tokens), `messages` of the messages alone, `attempt` counts from 1
    how often that request came. `reply` is ok, the fault's name, or limit, rpm, bad_request. `texts` counts the choices
    by kind. What a broken connection keeps from the client is billed all the same. `arrived` and `time` are seconds
    since 1970, `in_flight` includes this request unless it was refused at the door.
    """

    request: str
    attempt: int
    reply: str
    status: int
    messages: str = ""
    seed: int | None = None
    n: int = 0
    choices: int = 0
    texts: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    arrived: float = 0.0
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Said:
    """An HTTP reply, and what is written down about it. `choices` are (kind, text)."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    choices: tuple[tuple[str, str], ...] = ()
    usage: Mapping[str, int] = field(default_factory=dict)

    def head(self) -> bytes:
        """Status line and headers, promising the whole body."""
        headers = {"Content-Type": self.kind, "Content-Length": len(self.body), **self.headers}
        lines = [f"HTTP/1.1 {self.status} {_PHRASES[self.status]}", *(f"{name}: {it}" for name, it in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def error(status: int, message: str, wait: float | None = None) -> Said:
    """An error in OpenAI's shape."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return Said(status, json.dumps(body).encode(), headers={} if wait is None else {"Retry-After": f"{wait:g}"})


class Wire:
    """One connection. Each way to send says whether the connection can carry another request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, settings: FaultSettings) -> None:
        self._reader, self._writer, self._settings = reader, writer, settings

    async def send(self, said: Said, manner: str) -> bool:
        """Send a reply in one of the manners of `WIRE`; any other is whole."""
        ways: dict[str, Callable[[Said], Awaitable[bool]]] = {
            "hang": self._hang,
            "drip": self._drip,
            "reset": self._reset,
            "reset_midway": self._reset_midway,
            "short": self._short,
        }
        return await ways.get(manner, self._whole)(said)

    async def _whole(self, said: Said) -> bool:
        self._writer.write(said.head() + said.body)
        await self._writer.drain()
        return True

    async def _half(self, said: Said) -> None:
        self._writer.write(said.head() + said.body[: len(said.body) // 2])
        await self._writer.drain()

    async def _hang(self, said: Said) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._reader.read(1), self._settings.hang_s)  # ends when the client goes away
        return False

    async def _drip(self, said: Said) -> bool:
        self._writer.write(said.head())
        pause = self._settings.drip_s / len(said.body)
        for place in range(len(said.body)):
            self._writer.write(said.body[place : place + 1])
            await self._writer.drain()
            await asyncio.sleep(pause)
            if self._reader.at_eof():
                return False
        return True

    async def _reset(self, said: Said) -> bool:
        # Closing with a linger time of zero sends RST instead of FIN.
        connection = self._writer.get_extra_info("socket")
        with suppress(OSError):  # the client may have gone away first
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        return False

    async def _reset_midway(self, said: Said) -> bool:
        await self._half(said)
        await asyncio.sleep(0.01)  # a reset drops what is still on its way
        return await self._reset(said)

    async def _short(self, said: Said) -> bool:
        await self._half(said)
        return False


class FaultServer:
    """The server, for `with`: it runs in a thread of its own. `settings` may be replaced while it runs.

    `script` names what the first requests meet, in order of arrival (`ok` or one of `KINDS`); then `settings` decide.
    """

    def __init__(
        self,
        settings: FaultSettings | None = None,
        *,
        script: Iterable[str] = (),
        port: int = 0,
        log_file: Path | str | None = None,
    ) -> None:
        """Not serving yet.

        Raises:
            ValueError: the script names a fault that there is not.
        """
        self.settings = settings or FaultSettings()
        self._script = deque(script)
        if unknown := sorted(set(self._script) - {"ok", *KINDS}):
            raise ValueError(f"no such fault: {', '.join(unknown)}; there are {', '.join(KINDS)}")
        self.port, self.in_flight, self.most_in_flight = port, 0, 0
        self._log_path = log_file
        self._file: TextIO | None = None
        self._log: list[Entry] = []
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # around what other threads read; all else belongs to the loop
        self._attempts: Counter[str] = Counter()  # by `Request.ask`, refused at the door or not
        self._sights: Counter[str] = (
            Counter()
        )  # by `Request.body`; the door's doing, a matter of timing, changes no fate
        self._recent: deque[float] = deque()
        self._blocks: set[int] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """What a client calls its base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def counts(self) -> Counter[str]:
        """Replies so far by kind: ok, the faults' names, limit, rpm, bad_request."""
        with self._lock:
            return self._counts.copy()

    @property
    def log(self) -> list[Entry]:
        """One entry for each request so far, in order of reply."""
        with self._lock:
            return list(self._log)

    @property
    def billed(self) -> dict[str, int]:
        """The usage that all replies so far add up to."""
        log = self.log
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        return {name: sum(getattr(entry, name) for entry in log) for name in names}

    # Running

    def __enter__(self) -> FaultServer:
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._failure = None
        self._thread = threading.Thread(target=self._run, name="fault server", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self.serve(self._ready.set))
            except OSError as failure:  # the port is taken, the log can't be opened
                self._failure = failure
                self._ready.set()

    async def serve(self, ready: Callable[[], object]) -> None:
        """Serve until `stop` is called in this loop; `ready` is called once `port` is known."""
        self._stop = asyncio.Event()
        self._file = open(self._log_path, "a", encoding="ascii") if self._log_path is not None else None  # noqa: SIM115
        try:
            server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=4096)
            self.port = server.sockets[0].getsockname()[1]
            ready()
            await self._stop.wait()
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections)
        finally:
            if self._file is not None:
                self._file.close()

    def stop(self) -> None:
        """End `serve`. In the loop's thread only; `with` does it by itself."""
        self._stop.set()

    # One connection

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            # Cancelled at the end of `serve`; clients go away when they like.
            gone = (ConnectionError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
            with suppress(asyncio.CancelledError, *gone):
                while await self._exchange(reader, writer):
                    pass
        except Exception as mistake:  # one of this file: it fails the test at the end of `with`
            self._failure = mistake
            raise
        finally:
            self._connections.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.rstrip().split("\r\n")
        method, _, target = line.rpartition(" ")[0].partition(" ")
        headers = {name.lower(): value.strip() for name, _, value in (item.partition(":") for item in rest)}
        size = headers.get("content-length", "0")
        wire = Wire(reader, writer, self.settings)
        if not size.isdigit() or int(size) > _MOST_BODY or "transfer-encoding" in headers:
            await wire.send(error(411, "a Content-Length is needed"), "whole")
            return False
        raw = await reader.readexactly(int(size))
        goes_on = await self._answer(wire, f"{method} {target.partition('?')[0]}", headers, raw)
        return goes_on and headers.get("connection", "").lower() != "close"

    async def _answer(self, wire: Wire, route: str, headers: Mapping[str, str], raw: bytes) -> bool:
        if route == "POST /v1/chat/completions":
            return await self._complete(wire, headers.get("authorization", ""), raw)
        if route == "GET /v1/models":
            models = {"object": "list", "data": [{"id": self.settings.model, "object": "model", "owned_by": "faults"}]}
            return await wire.send(Said(200, json.dumps(models).encode()), "whole")
        return await wire.send(error(404, f"no such route: {route}"), "whole")

    # One request

    async def _complete(self, wire: Wire, key: str, raw: bytes) -> bool:
        try:
            request = Request.read(raw)
        except ValueError as mistake:
            visit = self._visit(hashlib.sha256(raw).hexdigest(), None)
            return await self._reply(wire, visit, "bad_request", error(400, str(mistake)))
        visit = self._visit(request.ask, request)
        if refused := self._door():
            return await self._reply(wire, visit, refused, self._refusal(refused, key))
        with self._under_way():
            sight = self._sights[request.body]
            self._sights[request.body] += 1
            fate = self._fate(request, sight)
            if not fate.startswith("429"):  # those come at once from real servers too
                pause = self.settings.jitter * unit("jitter", self.settings.seed, request.body, sight)
                await asyncio.sleep(self.settings.latency + pause)
            return await self._reply(wire, visit, fate, self._compose(request, fate, sight, key))

    def _visit(self, ask: str, request: Request | None) -> Visit:
        self._attempts[ask] += 1
        return Visit(ask, self._attempts[ask], time.time(), request)

    async def _reply(self, wire: Wire, visit: Visit, reply: str, said: Said) -> bool:
        said = replace(said, headers={**said.headers, "x-request-id": f"req-{visit.ask[:16]}-{visit.attempt}"})
        self._write_down(visit, reply, said)
        return await wire.send(said, reply)

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1

    def _door(self) -> str:
        """Which limit turns a request away, if any."""
        limit, rpm = self.settings.limit, self.settings.rpm
        if limit and self.in_flight >= limit:
            return "limit"
        if rpm:
            now = time.monotonic()
            while self._recent and self._recent[0] <= now - 60:
                self._recent.popleft()
            if len(self._recent) >= rpm:
                return "rpm"
            self._recent.append(now)
        return ""

    def _refusal(self, limit: str, key: str) -> Said:
        wait = self.settings.retry_after
        if limit == "rpm":
            wait = max(wait, round(self._recent[0] + 60 - time.monotonic(), 3))
        message = self._with_key(f"Rate limit reached ({limit}).", key)
        return error(429, message, wait if self.settings.limit_says_when else None)

    def _fate(self, request: Request, sight: int) -> str:
        """ok, or the fault that this request meets at this sight of its body."""
        if self._script:
            return self._script.popleft()
        settings = self.settings
        if unit("fate", settings.seed, request.body, sight) >= settings.faults:
            return "ok"
        weights = {kind: weight for kind, weight in settings.kinds.items() if self._can_meet(request, kind)}
        place = unit("kind", settings.seed, request.body, sight) * sum(weights.values())
        for kind, weight in weights.items():
            place -= weight
            if place < 0:
                return kind
        return "ok"

    def _can_meet(self, request: Request, kind: str) -> bool:
        if kind in ("duplicates", "fewer"):
            return self.settings.n_honoured and request.n > 1
        return kind != "restart" or bool(request.partial)

    def _write_down(self, visit: Visit, reply: str, said: Said) -> None:
        request = visit.request
        entry = Entry(
            request=visit.ask,
            attempt=visit.attempt,
            reply=reply,
            status=0 if reply in ("hang", "reset") else said.status,
            messages=request.messages if request else "",
            seed=request.seed if request else None,
            n=request.n if request else 0,
            choices=len(said.choices),
            texts=Counter(kind for kind, _ in said.choices),
            prompt_tokens=said.usage.get("prompt_tokens", 0),
            cached_tokens=said.usage.get("cached_tokens", 0),
            completion_tokens=said.usage.get("completion_tokens", 0),
            in_flight=self.in_flight,
            arrived=visit.arrived,
            time=time.time(),
        )
        if self._file is not None:
            self._file.write(json.dumps(vars(entry)) + "\n")
            self._file.flush()
        with self._lock:
            self._log.append(entry)
            self._counts[reply] += 1

    # What is said

    def _compose(self, request: Request, fate: str, sight: int, key: str) -> Said:
        wait = self.settings.retry_after if fate == "429" else None
        if fate in STATUS:
            return error(STATUS[fate], self._with_key(f"On purpose: {STATUS[fate]}.", key), wait)
        if fate == "hang":
            return Said(200, b"")
        if fate == "html":
            return Said(200, PAGE.format(self._with_key("", key)).encode(), "text/html; charset=utf-8")
        if fate == "error_in_200":  # a router that tells its upstream's error
            return replace(error(502, self._with_key("The upstream failed.", key)), status=200)
        choices = () if fate in ("no_choices", "null_choices") else self._choices(request, fate, sight)
        usage = self._usage(request, choices)
        body = json.dumps(self._payload(request, fate, choices, usage)).encode("ascii")
        if fate == "truncated":
            body = body[: len(body) // 2]
        elif fate == "malformed":
            body = body[:-1] + b",}"
        return Said(200, body, choices=choices, usage=usage)

    def _with_key(self, message: str, key: str) -> str:
        return f"{message} Authorization: {key}".strip() if self.settings.echo_key else message

    def _payload(
        self, request: Request, fate: str, choices: Iterable[tuple[str, str]], usage: Mapping[str, int]
    ) -> dict[str, Any]:
        finish = None if fate == "no_finish" else self.settings.finish
        written = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop" if kind == "refusal" else finish,
            }
            for index, (kind, text) in enumerate(choices)
        ]
        told = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        return {
            "id": f"chatcmpl-{request.ask[:24]}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.settings.model,
            "choices": None if fate == "null_choices" else written,
            "usage": {
                **told,
                "total_tokens": sum(told.values()),
                "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
            },
        }

    def _choices(self, request: Request, fate: str, sight: int) -> tuple[tuple[str, str], ...]:
        n = request.n if self.settings.n_honoured else 1
        if fate == "fewer":
            n = max(1, n // 2)
        drawn = [self._draw(request, fate, index, sight) for index in range(n)]
        rate = self.settings.duplicate_rate
        if fate == "duplicates" or unit("duplicates", self.settings.seed, request.ask) < rate:
            drawn[1:] = [("duplicate", drawn[0][1])] * (n - 1)
        return tuple(drawn)

    def _draw(self, request: Request, fate: str, index: int, sight: int) -> tuple[str, str]:
        """One text and its kind. Without a seed in the request every sight draws anew, as it does elsewhere."""
        settings = self.settings
        drawn = f"unseeded {sight} {index}" if request.seed is None else request.seed + index
        name = (request.messages, drawn, index if settings.place_counts else 0)
        chance = unit("text", settings.seed, *name)
        if fate == "empty":
            return "empty", ""
        if fate == "refusal" or (fate != "restart" and chance < settings.refusal_rate):
            return "refusal", REFUSAL
        if request.partial and (fate == "restart" or chance < settings.refusal_rate + settings.restart_rate):
            most = _TOKEN_CHARS * (request.max_tokens or 64)
            return "restart", request.partial[:most]
        return "no_finish" if fate == "no_finish" else "good", request.echo + _continuation(request.partial, *name)

    def _usage(self, request: Request, choices: Iterable[tuple[str, str]]) -> dict[str, int]:
        most = request.max_tokens or math.inf
        return {
            "prompt_tokens": tokens(request.prompt),
            "cached_tokens": self._cached(request.prompt),
            "completion_tokens": sum(int(min(tokens(text), most)) for _, text in choices),
        }

    def _cached(self, prompt: str) -> int:
        """Tokens at the prompt's beginning that some prompt before it began with; remembers this one."""
        if not self.settings.cache:
            return 0
        step = self.settings.cache_step
        chars, chain, known, hits = step * _TOKEN_CHARS, 0, True, 0
        for start in range(0, len(prompt) - chars + 1, chars):
            chain = hash((chain, step, prompt[start : start + chars]))  # stands for all the text up to here
            known = known and chain in self._blocks
            hits += known
            self._blocks.add(chain)
        cached = hits * step
        return cached if cached >= self.settings.cache_least else 0


def _continuation(partial: str, *name: Any) -> str:
    """A short continuation, fixed by its name. It counts on where the text counts, for clients that try just that."""
    drawn = int(digest(*name)[:16], 16)
    one, other = drawn % 9_973, drawn // 9_973 % 99_991
    text = f" {one}. {one}+{other}={one + other}"
    counting = _COUNTING.search(partial[-32:])
    return f" {int(counting[1]) + 1},{text}" if counting else text


def parser() -> argparse.ArgumentParser:
    """The program's flags: one for each field of `FaultSettings`, and a few of its own."""
    flags = argparse.ArgumentParser(
        description=__doc__,
        epilog=FaultSettings.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--port", type=int, default=0, help="0: any that is free")
    flags.add_argument("--log", metavar="FILE", help="append one JSON line for each request")
    flags.add_argument("--script", default="", metavar="KIND,KIND,...", help="what the first requests meet")
    for setting in fields(FaultSettings):
        flag, default = f"--{setting.name.replace('_', '-')}", getattr(FaultSettings(), setting.name)
        if setting.name == "kinds":
            flags.add_argument(
                flag, type=weigh, default=default, metavar="KIND[=WEIGHT],...", help=f"of {KINDS}, {[*GROUPS]}"
            )
        elif isinstance(default, bool):
            flags.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            flags.add_argument(flag, type=type(default), default=default, metavar=type(default).__name__.upper())
    return flags


async def _program(server: FaultServer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    await server.serve(lambda: print(f"serving faults at {server.url}", flush=True))


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted."""
    flags = parser()
    given = vars(flags.parse_args(arguments))
    port, log, script = given.pop("port"), given.pop("log"), given.pop("script")
    try:
        server = FaultServer(FaultSettings(**given), script=filter(None, script.split(",")), port=port, log_file=log)
    except ValueError as mistake:
        flags.error(str(mistake))
    asyncio.run(_program(server))
    return 0


if __name__ == "__main__":
    sys.exit(main())
