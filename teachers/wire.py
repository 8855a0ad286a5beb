"""What a back end and the code that calls it say to each other: settings, requests, replies, verdicts.

ApiTeacher ── Ask ──▶ Backend.session() ── Session.draw(ask, n, seed) ──▶ Outcome
                              │
           HTTP: `backend.HttpBackend` (a `Wire`) over `transport.Transport`
           in process: `engine.Engine`
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable
from urllib.parse import urlsplit

import httpx
from pydantic import ConfigDict, Field, SecretStr, field_validator

from omniopd.errors import ConfigError, TeacherError
from omniopd.ledger import Price
from omniopd.settings import Settings
from omniopd.types import Capabilities, Message, Usage
from teachers.asks import Ask, Choice
from teachers.ladder import Rung

Action = Literal["throttle", "retry", "drop", "stop", "ask", "downgrade"]

T = TypeVar("T")

LEAST_SECRET = 8  # characters


class TeacherConfig(Settings):
    """The settings that every live teacher has.

    `continuation` names the rung of the ladder; `auto` takes the best that a look at the live teacher proves, and keeps
    what it saw in the store. `system` opens every request. `temperature: null` and `top_p: null` are not sent, for models
    that refuse them. `logprobs: k` keeps each written token's log-prob and its k likeliest alternatives in the evidence,
    where the back end returns them. `thinking: off` asks for no hidden reasoning in the back end's own way, and
    `thinking_tokens` are added to every token limit for models that think all the same. `warm_cache` asks about one
    rollout's chunks one after another, so that each finds the one before in the provider's prompt cache: cheaper where
    cached input has a discount, slower where it has none. `allow_prompt_difference` goes on although student and teacher
    are shown different text.
    """

    # A value that fails to validate is not quoted: it may be a key in the wrong place.
    model_config = ConfigDict(hide_input_in_errors=True)

    type: str
    continuation: Literal["auto", "raw", "prefill", "instruct"] = "auto"
    system: str | None = None
    temperature: float | None = Field(default=1.0, ge=0)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    logprobs: int = Field(default=0, ge=0, le=100)
    thinking: Literal["default", "off"] = "default"
    thinking_tokens: int = Field(default=0, ge=0)
    warm_cache: bool = True
    allow_prompt_difference: bool = False
    fingerprint: str | None = None
    price: Price | None = None

    @field_validator("thinking", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a bare `off`


class HttpConfig(TeacherConfig):
    """The settings that every teacher behind HTTP has.

    The key is read from the environment variable that `api_key_env` names; null: none. `fingerprint` names the weights
    where the address does not (a server that moves, two servers behind one address): it stands in for host and path in
    the teacher's fingerprint, which otherwise leaves out the port of this machine's own servers. `tokenizer` (a folder or
    hub id) renders prompts here, which the rung `raw` and the prompt check need. `extra_body` is sent with every request,
    and kept in the store: no secrets in it.

    `concurrency` bounds the calls under way: a number, or `auto`, which finds out what the server takes. `rpm` and `tpm`
    are limits per minute that are never passed. `timeout_s` bounds one call, `max_attempts` its tries after a passing
    fault (one that fails to the end is a counted hole, `error`). `n: false` draws one text per call, `auto` as many as the
    server gives; `seed: false` sends none.
    """

    base_url: str
    model: str = Field(min_length=1)
    api_key_env: str | None
    tokenizer: str | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)
    n: bool | Literal["auto"] = "auto"
    seed: bool | Literal["auto"] = "auto"
    concurrency: Literal["auto"] | int = "auto"
    rpm: int | None = Field(default=None, ge=1)
    tpm: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=60.0, gt=0)
    max_attempts: int = Field(default=6, ge=1)

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http or https address, such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("must hold no user, password or query: keys come from the variable in api_key_env")
        parts.port  # noqa: B018 (raises ValueError where the port is no number)
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("must be the NAME (in capitals) of an environment variable that holds the key, not a key")
        return name

    @field_validator("concurrency")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be auto or a number of calls from 1 up")
        return value

    @property
    def place(self) -> str:
        """Where the weights are, for the fingerprint."""
        if self.fingerprint is not None:
            return self.fingerprint
        parts = urlsplit(self.base_url)
        if is_loopback(parts.hostname):  # a local server takes another port with each run
            return f"localhost{parts.path}"
        return f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a failed reply.

    `message` is one line for the user; `reason` is counted where a call is dropped; `wait_s` is what the body asks to wait
    (headers are read by the transport); `param` names the refused setting of a downgrade: n, seed, logprobs, prefill, ...
    """

    action: Action
    message: str
    reason: str = "error"
    wait_s: float = 0.0
    param: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What one successful call brought. `choices` is never empty, but may be shorter or longer than asked.

    `usage` holds the five token counts as the provider tells them, normalised (see `omniopd.types.Usage`); None where it
    tells none.
    """

    choices: tuple[Choice, ...]
    model: str = ""
    usage: Usage | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """A call's end: what its reply was read as, or the reason why it was dropped, and the HTTP requests sent for it."""

    attempts: int
    value: T | None = None
    reason: str = "error"
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP POST. `tokens` is an estimate of what it will use, for limits per minute."""

    url: str
    body: Mapping[str, Any]
    tokens: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


class KeyAuth(httpx.Auth):
    """Puts a key into one header of each request. Its value is in no `repr`, and is read nowhere else."""

    def __init__(self, key: SecretStr, header: str = "Authorization", scheme: str = "Bearer ") -> None:
        self._key, self._header, self._scheme = key, header, scheme

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Called by httpx."""
        request.headers[self._header] = self._scheme + self._key.get_secret_value()
        yield request

    def scrub(self, text: str) -> str:
        """The text with the key starred out. A dummy key such as "EMPTY" is left: it may be a word of a reply."""
        if len(self._key.get_secret_value()) < LEAST_SECRET:
            return text
        return text.replace(self._key.get_secret_value(), "***")

    def account(self) -> str:
        """A hash that tells one account from another."""
        return hashlib.sha256(self._key.get_secret_value().encode()).hexdigest()[:16]


def key_from_env(name: str | None, header: str = "Authorization", scheme: str = "Bearer ") -> KeyAuth | None:
    """The key that the environment variable `name` holds; None needs no key.

    Raises:
        ConfigError: the variable is unset or empty, or no HTTP header can carry its value.
    """
    if name is None:
        return None
    key = SecretStr(os.environ.get(name, "").strip())
    if not key.get_secret_value():
        raise ConfigError(
            f"teacher.api_key_env: the environment variable {name} is not set; "
            "export it, or set teacher.api_key_env to null for a server that needs no key"
        )
    # The HTTP library would quote the whole header in its error.
    if not all("!" <= character <= "~" for character in key.get_secret_value()):
        raise ConfigError(f"teacher.api_key_env: {name} holds characters that no HTTP header can carry; set it again")
    return KeyAuth(key, header, scheme)


class Malformed(ValueError):
    """A reply of status 200 that is not what the back end's format promises; worth another try."""


class RefusedRequest(TeacherError):
    """The server understood the request and refuses its form: `param` names the setting, where the server does."""

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message)
        self.param = param


class Wire(Protocol):
    """What the transport needs of a back end. The key is in `auth` alone, so no frame of a traceback holds it."""

    @property
    def base_url(self) -> str:
        """The server's address, for messages and to tell this machine's own servers."""
        ...

    @property
    def auth(self) -> KeyAuth | None:
        """Signs each request; None where no key is needed."""
        ...

    def scrub(self, text: str) -> str:
        """The text without the key, should the server say it back."""
        ...

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply, or None if it is no failure; `payload` is None where the body is no JSON."""
        ...


class Session(Protocol):
    """A teacher's doors while one gather lasts."""

    async def draw(self, ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
        """n texts for one request, the first of them with this seed (None: with none).

        Raises:
            RefusedRequest: the teacher refuses this form of request.
            TeacherError: it can't be used at all.
        """
        ...


@runtime_checkable
class Shows(Protocol):
    """A session that may be able to show the prompt as the teacher's model gets it."""

    async def shown(self, messages: Sequence[Message]) -> str | None:
        """The rendering of a chat, control tokens included; None where it can't be told."""
        ...


@runtime_checkable
class Quits(Protocol):
    """A session whose calls may wait before they are sent."""

    def quit(self) -> None:
        """Send nothing more: calls that are not under way are cancelled."""
        ...


class Backend(Protocol):
    """A way to reach a teacher, and what tells this teacher from another.

    Attributes:
        fingerprint: names everything that can change an answer; no secret.
        place: where it is (an address, a folder), for messages.
        rungs: the rungs of the ladder that its settings allow, best first; the last needs no proof.
        template: hash of the chat template that renders `raw` requests; "" where there is none.
    """

    fingerprint: str
    place: str
    rungs: tuple[Rung, ...]
    template: str

    @property
    def offers(self) -> Capabilities:
        """What it can give beside text."""
        ...

    def session(self) -> AbstractAsyncContextManager[Session]:
        """Connections (or a worker) for one gather. They belong to the running event loop, so they don't outlive it."""
        ...

    def record(self) -> dict[str, Any]:
        """The settings that the store keeps beside the fingerprint; no secret."""
        ...


def is_loopback(host: str | None) -> bool:
    """Whether a host name means this machine."""
    return host is not None and (host == "localhost" or host == "::1" or host.startswith("127."))
