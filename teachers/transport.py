"""HTTP calls to a teacher: sent when the pace lets them, bounded in time, retried by verdict.

A back end (`Wire`) classifies what went wrong, from a table and without sleeping; this module alone acts on it:

    throttle, retry   wait for as long as the server asks, and at least a jittered exponential backoff, then ask again;
                      after `max_attempts` the call is dropped with the reason `error`
    drop              no second try; the reason is counted
    stop, ask         `TeacherError`: no money left, or something that the user must change
    downgrade         `RefusedRequest`: the server refuses this form of request

A call is one HTTP request as the caller sees it; `attempts` says how many were sent for it. Between two tries a call is
out of the pace, so that others take its turn.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity

from omniopd.errors import TeacherError
from teachers.pace import How, Pace, Ticket
from teachers.wire import Call, Malformed, Outcome, RefusedRequest, Verdict, Wire, is_loopback

Sleep = Callable[[float], Awaitable[None]]
T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0  # a training step waits for the slowest call: the ceiling is low
LONGEST_ASKED_S = 120.0  # a server that asks for more is not disobeyed: the call is dropped
LONGEST_CONNECT_S = 10.0
POOL = 8  # connections of one client: httpx looks at all of them for every call, so many small pools beat a large one
_JSON = "application/json"
_ESCAPED = re.compile(r"\\[u/]")
_RESET = re.compile(r"x-ratelimit-reset-.+|anthropic-ratelimit-.+-reset")
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d*)?)s)?(?:(\d+(?:\.\d*)?)ms)?", re.ASCII)
_UNITS_S = (86_400.0, 3_600.0, 60.0, 1.0, 0.001)


class _Failed(Exception):
    """A try that is worth another. `wait_s`: until then; the server's word at first, later at least our own backoff."""

    def __init__(self, detail: str, how: How = "fault", wait_s: float = 0.0, reached: bool = True) -> None:
        super().__init__(detail)
        self.detail, self.how, self.wait_s, self.reached = detail, how, wait_s, reached


class _Dropped(Exception):
    def __init__(self, reason: str, detail: str, how: How) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.how = reason, detail, how


@dataclass(slots=True)
class _Request:
    """One call on its way: what is sent, and what became of its tries."""

    method: str
    url: str
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    tries: int = 0
    sent: int = 0
    ticket: Ticket | None = None


class Sender:
    """One gather's connections. Made by `Transport.session`."""

    def __init__(self, transport: Transport, stack: AsyncExitStack) -> None:
        self._transport, self._stack = transport, stack
        self._idle: set[asyncio.Task[Any] | None] = set()  # calls that wait for their turn, or until their next try
        self._over = False
        self._free: list[httpx.AsyncClient] = []  # an entry for each connection that is not in use

    async def send(self, call: Call, parse: Callable[[Any], T]) -> Outcome[T]:
        """POST one request until it is answered, refused or given up.

        `parse` reads the reply's JSON; where it raises `Malformed`, the request is sent again. A server that is never
        reached is an error; one that answers badly to the end is a dropped call.

        Raises:
            RefusedRequest: the server refuses this form of request.
            TeacherError: can't connect, the key or the model is refused, no money is left, or it is down for minutes.
        """
        # ASCII, so that a lone surrogate in a student's text is sent as an escape and not refused by the encoder.
        content = json.dumps(dict(call.body), ensure_ascii=True).encode("ascii")
        headers = {"Content-Type": _JSON, **call.headers}
        return await self._repeat(_Request("POST", call.url, content, headers, call.tokens), parse)

    async def get(self, url: str, parse: Callable[[Any], T]) -> Outcome[T]:
        """GET something of the same server, in the same way.

        Raises:
            RefusedRequest: the server refuses this form of request.
            TeacherError: as in `send`.
        """
        return await self._repeat(_Request("GET", url), parse)

    def quit(self) -> None:
        """Send nothing more: calls that are not under way are cancelled, those that are end with this try."""
        self._over = True
        for task in self._idle:
            if task is not None:
                task.cancel()

    async def _repeat(self, request: _Request, parse: Callable[[Any], T]) -> Outcome[T]:
        task = asyncio.current_task()
        self._idle.add(task)
        try:
            value: T = await self._transport.retrying()(self._once, request, parse)
        except _Dropped as dropped:
            return Outcome(request.sent, None, dropped.reason, dropped.detail)
        except _Failed as failure:
            if failure.reached:
                return Outcome(request.sent, None, "error", failure.detail)
            raise TeacherError(
                f"teacher at {self._transport.wire.base_url} can't be reached ({failure.detail}); "
                "start the server or correct teacher.base_url"
            ) from None
        finally:
            self._idle.discard(task)
        return Outcome(request.sent, value)

    async def _once(self, request: _Request, parse: Callable[[Any], T]) -> T:
        """One try, from its turn in the pace to its end."""
        transport = self._transport
        ticket = request.ticket = await transport.pace.enter(request.tokens, after=request.ticket)
        request.tries += 1
        how: How = "gone"
        wait_s = 0.0
        task = asyncio.current_task()
        self._idle.discard(task)
        try:
            payload, response = await self._exchange(request)
            value = transport.read(payload, response, parse)
            how = "clean" if request.tries == 1 else "answered"
            return value
        except _Failed as failure:
            how, wait_s = failure.how, failure.wait_s
            if self._over:
                raise _Dropped("error", failure.detail, how) from None
            if request.tries < transport.max_attempts:
                wait_s = failure.wait_s = max(wait_s, transport.backoff(request.tries))
            raise
        except _Dropped as dropped:
            how = dropped.how
            raise
        except TeacherError:
            how = "answered"
            raise
        finally:
            self._idle.add(task)
            transport.pace.leave(ticket, how, wait_s)

    async def _exchange(self, request: _Request) -> tuple[Any, httpx.Response]:
        transport = self._transport
        try:
            with self._connection() as client:
                async with asyncio.timeout(transport.timeout_s):  # httpx's own starts again with every received byte
                    request.sent += 1
                    response = await client.request(
                        request.method, request.url, content=request.content, headers=request.headers
                    )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            request.sent -= 1
            raise _Failed(transport.clean(str(error) or type(error).__name__), reached=False) from None
        except (TimeoutError, httpx.TimeoutException):
            raise _Failed(f"no reply within {transport.timeout_s:g} s (teacher.timeout_s)") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _Failed(transport.clean(f"connection broke: {error or type(error).__name__}")) from None
        return transport.payload(response), response

    @contextmanager
    def _connection(self) -> Iterator[httpx.AsyncClient]:
        """A client with a connection to spare; as many are made as the pace lets calls through."""
        if not self._free:
            client = self._transport.client()
            self._stack.push_async_callback(client.aclose)
            self._free += [client] * POOL
        client = self._free.pop()
        try:
            yield client
        finally:
            self._free.append(client)


class Transport:
    """How a teacher is called. `http` and `sleep` are for tests: a fake network, and waits that are not slept."""

    def __init__(
        self,
        wire: Wire,
        pace: Pace,
        *,
        timeout_s: float,
        max_attempts: int,
        http: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.wire, self.pace, self.timeout_s, self.max_attempts = wire, pace, timeout_s, max_attempts
        self._http, self._sleep = http, sleep
        self._random = random.Random()  # its own: jitter must not move the global stream that seeded code may use

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Sender]:
        """Connections for one gather. They belong to the running event loop, so they don't outlive it."""
        async with AsyncExitStack() as stack:
            yield Sender(self, stack)

    def client(self) -> httpx.AsyncClient:
        """A client of `POOL` connections; who asks for it closes it."""
        local = is_loopback(urlsplit(self.wire.base_url).hostname)  # a proxy can't reach a server on this machine
        return httpx.AsyncClient(
            auth=self.wire.auth,
            limits=httpx.Limits(max_connections=POOL, max_keepalive_connections=POOL),
            timeout=httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, LONGEST_CONNECT_S), pool=None),
            transport=self._http,
            trust_env=not local,
            verify=self._trust,
        )

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        """The certificates to trust, read once: it takes longer than a call."""
        return httpx.create_ssl_context()

    def retrying(self) -> tenacity.AsyncRetrying:
        """The retry loop of one call."""
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Failed),
            stop=tenacity.stop_after_attempt(self.max_attempts),
            wait=_wait,
            sleep=self._sleep,
            reraise=True,
        )

    def backoff(self, tries: int) -> float:
        """Seconds to wait after so many tries: doubling, with jitter so that calls refused together come back apart."""
        ceiling: float = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(tries - 1, 16))
        return ceiling * self._random.uniform(0.5, 1.0)

    def payload(self, response: httpx.Response) -> Any:
        """The reply's JSON without the key, and without lone surrogates, which no tokenizer takes; None if it is none."""
        kind = response.headers.get("content-type", _JSON)
        if "json" not in kind.lower():
            return None
        try:
            text = self.wire.scrub(response.content.decode("utf-8"))
            payload = json.loads(text)
            if _ESCAPED.search(text):  # either may hide behind an escape
                text = self.wire.scrub(json.dumps(payload, ensure_ascii=False))
                payload = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
            return payload
        except (ValueError, RecursionError):
            return None

    def read(self, payload: Any, response: httpx.Response, parse: Callable[[Any], T]) -> T:
        """Act on the verdict, or read the reply.

        Raises:
            _Failed, _Dropped, TeacherError: by verdict.
        """
        verdict = self.wire.classify(response.status_code, payload)
        if verdict is not None:
            self._act(verdict, response)
        if payload is None:
            raise _Failed(f"HTTP {response.status_code} whose body is not JSON")
        try:
            return parse(payload)
        except Malformed as error:
            raise _Failed(self.clean(f"malformed reply: {error}")) from None

    def _act(self, verdict: Verdict, response: httpx.Response) -> NoReturn:
        message = self.clean(verdict.message)
        if verdict.action in ("throttle", "retry"):
            how: How = "throttled" if verdict.action == "throttle" else "fault"
            wait_s = asked_wait_s(verdict, response.headers)
            if wait_s > LONGEST_ASKED_S:
                raise _Dropped("error", f"{message}; the server asks to wait {wait_s:.0f} s", how)
            raise _Failed(message, how, wait_s)
        if verdict.action == "drop":
            raise _Dropped(verdict.reason, message, "answered")
        if verdict.action == "downgrade":
            raise RefusedRequest(message, verdict.param)
        raise TeacherError(message)

    def clean(self, text: str) -> str:
        """One line without the key, and without what a terminal would obey, for messages."""
        text = " ".join(self.wire.scrub(text).split())
        text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
        return text if len(text) <= 400 else f"{text[:400]}…"


def _wait(state: tenacity.RetryCallState) -> float:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, _Failed), "nothing else is tried again"
    return failure.wait_s


def asked_wait_s(verdict: Verdict, headers: httpx.Headers) -> float:
    """Seconds that the server asks to wait, in the body or in `Retry-After`.

    A throttle without the latter may say when its limits are whole again: of those that are used up (or of all, where it
    doesn't say which are), the last one counts.
    """
    wait_s = seconds(headers.get("retry-after"))
    if verdict.action == "throttle" and not wait_s:
        resets = {name: seconds(value) for name, value in headers.items() if _RESET.fullmatch(name)}
        spent = [wait for name, wait in resets.items() if headers.get(name.replace("reset", "remaining")) == "0"]
        wait_s = max(spent or resets.values(), default=0.0)
    return max(wait_s, verdict.wait_s) if math.isfinite(verdict.wait_s) else wait_s


def seconds(value: str | None) -> float:
    """Seconds from now that a header names: a number, `1m30s`, an ISO time or an HTTP date. 0 if absent, past or
    unreadable."""
    text = (value or "").strip()
    try:
        wait_s = _seconds(text) if text else 0.0
    except (ValueError, OverflowError):
        return 0.0
    return wait_s if math.isfinite(wait_s) and wait_s > 0 else 0.0


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    duration = _DURATION.fullmatch(text)
    if duration is not None:
        return sum(unit * float(part or 0) for unit, part in zip(_UNITS_S, duration.groups(), strict=True))
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        date = email.utils.parsedate_to_datetime(text)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
