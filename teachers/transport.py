"""HTTP calls to a teacher: bounded in number and time, retried by verdict.

A back end (`Wire`) classifies what went wrong, from a table and without sleeping; this module alone acts on it:

    throttle, retry   wait the larger of a jittered exponential backoff and the server's `Retry-After`, then ask again;
                      after `max_attempts` the call is dropped with the reason `error`
    drop              no second try; the reason is counted
    stop, ask         `TeacherError`: no money left, or something that the user must change
    downgrade         `RefusedRequest`: the server refuses this form of request

A call is one HTTP request as the caller sees it; `attempts` says how many were sent for it.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from omniopd.errors import TeacherError
from teachers.wire import Completion, Malformed, Outcome, RefusedRequest, Verdict, Wire

Sleep = Callable[[float], Awaitable[None]]

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0  # a training step waits for the slowest call: the ceiling is low
LONGEST_RETRY_AFTER_S = 120.0  # a server that asks for more is not disobeyed: the call is dropped
LONGEST_CONNECT_S = 10.0
POOL = 8  # connections of one client: httpx looks at all of them for every call, so many small pools beat a large one
_JSON = "application/json"


class _Again(Exception):
    def __init__(self, detail: str, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(detail)
        self.detail, self.wait, self.unreachable = detail, wait, unreachable


class _Dropped(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Session:
    """One gather's connections. Made by `Transport.session`; `clients` has one entry for each call that may be under way."""

    def __init__(self, transport: Transport, clients: Sequence[httpx.AsyncClient]) -> None:
        self._transport = transport
        self._free: asyncio.Queue[httpx.AsyncClient] = asyncio.Queue()
        for client in clients:
            self._free.put_nowait(client)

    async def call(self, body: Mapping[str, Any]) -> Outcome:
        """Send one request until it is answered, refused or given up.

        A call that waits before its next try keeps its place among the `concurrency`, so a server that throttles is
        asked less. A server that is never reached is an error; one that answers badly to the end is a dropped call.

        Raises:
            TeacherError: can't connect, the key or the model is refused, or no money is left.
        """
        attempts = 0
        client = await self._free.get()
        try:
            async for attempt in self._transport.retrying():
                with attempt:
                    attempts += 1
                    return Outcome(attempts, await self._once(client, body))
        except _Dropped as dropped:
            return Outcome(attempts, None, dropped.reason, dropped.detail)
        except _Again as failure:
            if failure.unreachable:
                raise TeacherError(
                    f"teacher at {self._transport.wire.url} can't be reached ({failure.detail}); "
                    "start the server or correct teacher.base_url"
                ) from None
            return Outcome(attempts, None, "error", failure.detail)
        finally:
            self._free.put_nowait(client)
        raise AssertionError("tenacity ends in an exception or a result")

    async def _once(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Completion:
        wire, timeout_s = self._transport.wire, self._transport.timeout_s
        # ASCII, so that a lone surrogate in a student's text is sent as an escape and not refused by the encoder.
        content = json.dumps(body, ensure_ascii=True)
        try:
            async with asyncio.timeout(timeout_s):  # httpx's own limit starts again with every received byte
                response = await client.post(wire.url, content=content, headers={"Content-Type": _JSON})
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Again(self._clean(str(error) or type(error).__name__), unreachable=True) from None
        except (TimeoutError, httpx.TimeoutException):
            raise _Again(f"no reply within {timeout_s:g} s (teacher.timeout_s)") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _Again(self._clean(f"connection broke: {error or type(error).__name__}")) from None
        payload = self._payload(response)
        verdict = wire.classify(response.status_code, payload)
        if verdict is not None:
            self._act(verdict, response)
        if payload is None:
            raise _Again(f"HTTP {response.status_code} whose body is not JSON")
        try:
            return wire.parse(payload)
        except Malformed as error:
            raise _Again(f"malformed reply: {error}") from None

    def _act(self, verdict: Verdict, response: httpx.Response) -> None:
        message = self._clean(verdict.message)
        if verdict.action in ("throttle", "retry"):
            wait = retry_after(response.headers.get("retry-after"))
            if wait > LONGEST_RETRY_AFTER_S:
                raise _Dropped("error", f"{message}; the server asks to wait {wait:.0f} s")
            raise _Again(message, wait)
        if verdict.action == "drop":
            raise _Dropped(verdict.reason, message)
        if verdict.action == "downgrade":
            raise RefusedRequest(message)
        raise TeacherError(message)

    def _payload(self, response: httpx.Response) -> Any:
        kind = response.headers.get("content-type", _JSON)
        if "json" not in kind.lower():
            return None
        try:
            return json.loads(self._transport.wire.scrub(response.content.decode("utf-8")))
        except (ValueError, RecursionError):
            return None

    def _clean(self, text: str) -> str:
        text = " ".join(self._transport.wire.scrub(text).split())
        return text if len(text) <= 400 else f"{text[:400]}…"


class Transport:
    """How a teacher is called. `http` and `sleep` are for tests: a fake network and a fake clock."""

    def __init__(
        self,
        wire: Wire,
        *,
        concurrency: int,
        timeout_s: float,
        max_attempts: int,
        http: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.wire, self.concurrency, self.timeout_s = wire, concurrency, timeout_s
        self._max_attempts, self._http, self._sleep = max_attempts, http, sleep
        self._random = random.Random()  # its own: jitter must not move the global stream that seeded code may use

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Connections for one gather. They belong to the running event loop, so they don't outlive it."""
        timeout = httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, LONGEST_CONNECT_S), pool=None)
        local = is_loopback(urlsplit(self.wire.url).hostname)  # a proxy can't reach a server on this machine
        limits = httpx.Limits(max_connections=POOL, max_keepalive_connections=POOL)
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    httpx.AsyncClient(
                        auth=self.wire.auth,
                        limits=limits,
                        timeout=timeout,
                        transport=self._http,
                        trust_env=not local,
                        verify=self._trust,
                    )
                )
                for _ in range(math.ceil(self.concurrency / POOL))
            ]
            yield Session(self, [clients[place % len(clients)] for place in range(self.concurrency)])

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        """The certificates to trust, read once: it takes longer than a call."""
        return httpx.create_ssl_context()

    def retrying(self) -> tenacity.AsyncRetrying:
        """The retry loop of one call."""
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_after_attempt(self._max_attempts),
            wait=self._wait,
            sleep=self._sleep,
            reraise=True,
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, _Again) else 0.0
        ceiling: float = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(state.attempt_number - 1, 16))
        return max(asked, ceiling * self._random.uniform(0.5, 1.0))


def retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for (a number, or an HTTP date); 0 if absent, past or unreadable."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def is_loopback(host: str | None) -> bool:
    """Whether a host name means this machine."""
    return host is not None and (host == "localhost" or host == "::1" or host.startswith("127."))
