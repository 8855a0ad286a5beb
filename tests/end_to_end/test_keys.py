"""A key is read from the environment, sent to its server, and nowhere else: not in a file, a log, a message, a traceback."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted import ScriptedTeacher, scripted

from omniopd import load_config
from omniopd.cli import main
from omniopd.errors import TeacherError
from omniopd.registry import TEACHERS
from omniopd.store import Store
from omniopd.types import AnswerQuery, Message, Prompt

KEY = "sk-CanaryKey/5f2d81c09a7e+x"  # with a sign that some servers escape
PIECE = "CanaryKey"
ENV = "OMNI_CANARY_KEY"

Body = dict[str, Any]
Reply = tuple[int, Any]


# ---------------------------------------------------------------------- one server for all formats


def openai(body: Body) -> Reply:
    return scripted({"seed": 0, **body})


def anthropic(body: Body) -> Reply:
    _, said = openai(body)
    content = [{"type": "text", "text": choice["message"]["content"]} for choice in said["choices"]]
    usage = {"input_tokens": 50, "output_tokens": 8}
    return 200, {"type": "message", "model": "m", "content": content, "stop_reason": "max_tokens", "usage": usage}


def gemini(body: Body) -> Reply:
    config = body["generationConfig"]
    draws = {"messages": body["contents"], "seed": config["seed"], "n": config.get("candidateCount", 1)}
    texts = [choice["message"]["content"] for choice in openai(draws)[1]["choices"]]
    content = [
        {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "MAX_TOKENS"} for text in texts
    ]
    usage = {"promptTokenCount": 50, "candidatesTokenCount": 8 * len(texts), "totalTokenCount": 50 + 8 * len(texts)}
    return 200, {"candidates": content, "usageMetadata": usage, "modelVersion": "m"}


ANSWERS: dict[str, Callable[[Body], Reply]] = {"openai": openai, "anthropic": anthropic, "gemini": gemini}
HEADER = {"openai": "Authorization", "anthropic": "x-api-key", "gemini": "x-goog-api-key"}


def error_of(kind: str, message: str) -> Any:
    shapes = {
        "openai": {"error": {"message": message, "type": "invalid_request_error", "code": "invalid_api_key"}},
        "anthropic": {"type": "error", "error": {"type": "authentication_error", "message": message}},
        "gemini": {"error": {"code": 401, "status": "UNAUTHENTICATED", "message": message}},
    }
    return shapes[kind]


# ---------------------------------------------------------------------- where a key could be


class Search:
    """All that a command left behind or said."""

    def __init__(self, place: Path, capture: pytest.CaptureFixture[str], log: pytest.LogCaptureFixture) -> None:
        self.place, self._capture, self._log = place, capture, log

    def find_nothing(self) -> str:
        """Fails where the key is; returns what was printed."""
        out, err = self._capture.readouterr()
        files = [path for path in self.place.rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert PIECE.encode() not in path.read_bytes(), path
            assert PIECE not in str(path)
        assert PIECE not in out + err
        assert PIECE not in self._log.text
        for record in self._log.records:
            assert PIECE not in f"{record.getMessage()} {record.args} {record.exc_text}"
        return out + err


@pytest.fixture
def search(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Search]:
    monkeypatch.setenv(ENV, KEY)
    caplog.set_level(logging.DEBUG)
    yield Search(tmp_path, capsys, caplog)


@pytest.fixture(params=ANSWERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(kind: str, settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path) -> str:
    """A config whose teacher is of that type and carries the key."""
    teacher.answer = ANSWERS[kind]
    settings["teacher"] = {
        "type": kind,
        "base_url": teacher.url,
        "model": "scripted",
        "api_key_env": ENV,
        "continuation": "prefill",
        "max_attempts": 1,
    }
    if kind == "openai":
        settings["teacher"]["prefill_style"] = "plain"
    settings["train"] = {**settings["train"], "steps": 1}
    settings["eval"] = {"problems": 2}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_run_a_report_a_probe_and_an_export(
    kind: str, config: str, teacher: ScriptedTeacher, search: Search, tmp_path: Path
) -> None:
    assert main(["train", config]) == 0
    sent = [
        {name.lower(): value for name, value in headers.items()}[HEADER[kind].lower()] for headers in teacher.headers
    ]
    assert sent and all(value.removeprefix("Bearer ") == KEY for value in sent)
    assert all(PIECE not in json.dumps(body) for body in teacher.bodies)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["probe", config, "--yes", "--json"]) == 0
    for what in ("draws", "calls"):
        assert main(["cache", "export", str(tmp_path / "run"), "--what", what, "--out", str(tmp_path / what)]) == 0
        assert (tmp_path / what).stat().st_size > 100
    assert main(["cache", "stats", str(tmp_path / "run")]) == 0
    search.find_nothing()
    store = Store(tmp_path / "run" / "answers.sqlite")
    assert store.stats().answers > 0
    assert PIECE not in json.dumps([*store.draws(), *store.calls(), store.teachers()])
    store.close()


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_says_the_key_back_in_an_error(
    kind: str, status: int, config: str, teacher: ScriptedTeacher, search: Search
) -> None:
    teacher.answer = lambda body: (status, error_of(kind, f"Incorrect API key provided: {KEY}. Header: Bearer {KEY}"))
    assert main(["train", config]) == 2
    said = search.find_nothing()
    assert "***" in said  # it was there
    assert "Traceback" not in said
    if status == 401:
        (line,) = [line for line in said.splitlines() if line.startswith("omniopd: ")]
        assert ENV in line


def test_a_server_that_says_the_key_back_in_an_answer(
    kind: str, config: str, teacher: ScriptedTeacher, search: Search, tmp_path: Path
) -> None:
    """Once plainly, and once as JSON may write it too."""
    escaped = KEY.replace("/", "\\/").replace("C", "\\u0043")
    assert json.loads(f'"{escaped}"') == KEY

    def echo(body: Body) -> Reply:
        status, said = ANSWERS[kind](body)
        text = json.dumps(said)
        for opening in ('"content": "', '"text": "'):
            text = text.replace(opening, f"{opening}{KEY} {escaped} ")
        return status, text.encode()

    teacher.answer = echo
    assert main(["train", config]) == 0
    search.find_nothing()
    store = Store(tmp_path / "run" / "answers.sqlite")
    texts = [draw["text"] for draw in store.draws()]
    store.close()
    assert texts and all(text.startswith("*** *** ") for text in texts)


def traced(error: BaseException) -> str:
    """A traceback with the values of all variables in it."""
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def test_a_crash_in_the_middle_of_a_call(
    kind: str, config: str, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, payload: Any, ask: Any) -> Any:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(TEACHERS.get(kind).Backend, "read", broken)
    with pytest.raises(ZeroDivisionError) as crash:
        main(["train", config])
    told = traced(crash.value)
    assert "transport.py" in told and "api_key_env" in told  # as deep as where the key is used
    assert PIECE not in told
    search.find_nothing()


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "nonsense"])
def test_a_connection_that_fails_shows_no_key(
    refuses: bool, kind: str, config: str, teacher: ScriptedTeacher, search: Search
) -> None:
    """The HTTP library's own exceptions hold the request with its headers."""
    if refuses:
        teacher.server.server_close()
    else:
        teacher.server.RequestHandlerClass.send_response = lambda self, *_: self.wfile.write(b"nonsense\r\n\r\n")  # type: ignore[method-assign]
    settings = load_config(Path(config)).teacher
    store = Store(search.place / "answers.sqlite")
    queries = [AnswerQuery(Prompt("p", (Message("user", "Hi"),)), row, 1, 8, row) for row in range(9)]
    with pytest.raises(TeacherError) as failure:
        asyncio.run(TEACHERS.build(settings, store).gather(queries))
    store.close()
    assert PIECE not in traced(failure.value)
    search.find_nothing()


@pytest.mark.parametrize("value", ["sk-CanaryKey\u20ac", "sk-CanaryKey and more", "sk-Canary\nKey"])
def test_a_key_that_no_header_can_carry_is_not_quoted(
    value: str, config: str, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV, value)
    assert main(["train", config]) == 2
    assert ENV in (said := search.find_nothing())
    assert "Canary" not in said


@pytest.mark.parametrize(
    "override",
    [f"teacher.api_key_env={KEY}", f"teacher.api_key={KEY}", f"teacher.base_url=http://{PIECE}@127.0.0.1/v1"],
)
def test_a_key_in_the_wrong_place_is_not_quoted(override: str, config: str, search: Search) -> None:
    assert main(["train", config, override]) == 2
    assert "teacher." in search.find_nothing()
