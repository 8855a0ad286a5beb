"""What a back end and the code that calls it say to each other: settings, replies, verdicts."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx
from pydantic import ConfigDict, Field, SecretStr

from omniopd.errors import ConfigError, TeacherError
from omniopd.settings import Settings
from teachers.asks import Ask, Choice

Action = Literal["throttle", "retry", "drop", "stop", "ask", "downgrade"]

LEAST_SECRET = 8  # characters


class Price(Settings):
    """What a provider charges, in USD per million tokens. None are shipped: they age."""

    prompt: float = Field(default=0.0, ge=0)
    completion: float = Field(default=0.0, ge=0)


class ApiConfig(Settings):
    """The settings that every teacher behind an API has.

    `continuation` names the rung; `auto` looks once, live, and keeps what it saw in the store. `system` opens every
    request. `concurrency` bounds the calls under way, `timeout_s` one call, `max_attempts` its tries after a passing
    fault (one that fails to the end is a counted hole, `error`). `n: false` draws one text per call. `warm_cache` asks
    about one rollout's chunks one after another, so that each finds the one before in the provider's prompt cache:
    cheaper where cached input has a discount, slower where it has none.
    """

    # A value that fails to validate is not quoted: it may be a key in the wrong place.
    model_config = ConfigDict(hide_input_in_errors=True)

    continuation: Literal["auto", "prefill", "instruct"] = "auto"
    system: str | None = None
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: bool = True
    warm_cache: bool = True
    concurrency: int = Field(default=64, ge=1)
    timeout_s: float = Field(default=60.0, gt=0)
    max_attempts: int = Field(default=6, ge=1)
    price: Price | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a failed reply. `message` is one line for the user; `reason` is counted where it is dropped."""

    action: Action
    message: str
    reason: str = "error"


@dataclass(frozen=True, slots=True)
class Completion:
    """What one successful call brought. `choices` is never empty, but may be shorter or longer than asked."""

    choices: tuple[Choice, ...]
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A call's end: a completion, or the reason why it was dropped, and the HTTP requests sent for it."""

    attempts: int
    completion: Completion | None = None
    reason: str = "error"
    detail: str = ""


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


def key_from_env(name: str | None) -> KeyAuth | None:
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
    return KeyAuth(key)


class Malformed(ValueError):
    """A reply of status 200 that is not what the back end's format promises; worth another try."""


class RefusedRequest(TeacherError):
    """The server understood the request and refuses its form (a parameter, an open assistant turn)."""


class Wire(Protocol):
    """What the transport needs of a back end. The key is in `auth` alone, so no frame of a traceback holds it."""

    url: str

    @property
    def auth(self) -> httpx.Auth | None:
        """Signs each request; None where no key is needed."""
        ...

    def scrub(self, text: str) -> str:
        """The text without the key, should the server say it back."""
        ...

    def parse(self, payload: Any) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: the payload has another shape.
        """
        ...

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply, or None if it is no failure; `payload` is None where the body is no JSON."""
        ...


class Backend(Wire, Protocol):
    """A wire that also knows what a request looks like, and what tells this teacher from another."""

    fingerprint: str

    def body(self, ask: Ask, n: int, seed: int) -> dict[str, Any]:
        """The JSON of a request for n draws, the first of them with this seed."""
        ...

    def record(self) -> dict[str, Any]:
        """The settings that the store keeps beside the fingerprint; no secret."""
        ...
