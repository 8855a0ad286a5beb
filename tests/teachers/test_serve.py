"""The embedded text-only teacher, serving the demo model."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from omniopd.chat import ChatTemplate
from omniopd.cli import main
from omniopd.errors import TeacherError
from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Evidence, Message, Prompt
from teachers.local import local_server
from teachers.openai import OpenAIConfig, OpenAITeacher
from teachers.serve import application
from teachers.transformers import TransformersEngine

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "demo" / "teacher"
QUESTION = "Ann has 12 apples. Ann buys 7 more. Ann gives 5 to Ben. How many apples does Ann have now?"
USER = {"role": "user", "content": QUESTION}


def engine() -> TransformersEngine:
    return TransformersEngine.load(str(TEACHER), ChatTemplate.load(str(TEACHER), "model"), field="model")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(application(engine(), "teacher")) as client:
        yield client


def ask(client: TestClient, *messages: dict[str, str], **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": list(messages), "seed": 1} | fields)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def test_it_answers_the_question(client: TestClient) -> None:
    response = ask(client, USER, temperature=0, max_tokens=160)
    assert texts(response)[0].endswith("#### 14")
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_it_goes_on_from_an_open_turn_in_the_students_style(client: TestClient) -> None:
    open_turn = {"role": "assistant", "content": "12+7=19. 19-5="}
    fields = {"add_generation_prompt": False, "continue_final_message": True, "temperature": 0}
    assert texts(ask(client, USER, open_turn, **fields)) == ["14. #### 14"]
    closed = {"role": "assistant", "content": "12+7=19. 19-5=14."}
    assert texts(ask(client, USER, closed, **fields)) == [" #### 14"]  # the leading space is kept


def test_n_draws_differ_and_the_seed_repeats_them(client: TestClient) -> None:
    drawn = texts(ask(client, USER, n=8, max_tokens=40))
    assert len(drawn) == 8
    assert len(set(drawn)) > 1
    assert texts(ask(client, USER, n=8, max_tokens=40)) == drawn
    assert texts(ask(client, USER, n=8, max_tokens=40, seed=2)) != drawn


def test_the_token_limit_is_kept_and_counted(client: TestClient) -> None:
    response = ask(client, USER, n=3, max_tokens=5, temperature=0)
    body = response.json()
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 15


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"stream": True}, "stream"),
        ({"n": 0}, "n:"),
        ({"temperature": -1}, "temperature:"),
        ({"max_tokens": "many"}, "max_tokens:"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role:"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "messages.0.content:"),
        ({"add_generation_prompt": False}, "add_generation_prompt:"),
    ],
)
def test_what_it_does_not_offer_is_refused(client: TestClient, fields: dict[str, Any], said: str) -> None:
    response = ask(client, USER, **fields)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_a_body_that_is_no_json_and_a_prompt_that_is_too_long(client: TestClient) -> None:
    assert client.post("/v1/chat/completions", content=b"{").status_code == 400
    response = ask(client, {"role": "user", "content": "12 " * 3000})
    assert response.status_code == 400
    assert "context of 2048" in response.json()["error"]["message"]


def test_the_text_of_a_control_token_stays_text(client: TestClient) -> None:
    def read(content: str) -> int:
        return int(ask(client, {"role": "user", "content": content}, max_tokens=1).json()["usage"]["prompt_tokens"])

    assert read("12</s>") - read("12") > 1


def test_a_batch_that_fails_is_a_fault_of_the_server(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("teachers.transformers.sample", fail)
    response = ask(client, USER)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the model failed to draw: out of luck"
    monkeypatch.undo()
    assert ask(client, USER, max_tokens=1).status_code == 200


def test_too_long_a_prompt_is_a_counted_hole(tmp_path: Path) -> None:
    async def go() -> Evidence:
        app = application(engine(), "teacher")
        config = OpenAIConfig(base_url="http://127.0.0.1:9/v1", model="teacher", api_key_env=None)
        async with app.router.lifespan_context(app):
            teacher = OpenAITeacher(config, Store(tmp_path / "answers.sqlite"), http=httpx.ASGITransport(app))
            prompt = Prompt("long", (Message("user", "12 " * 3000),))
            return (await teacher.gather([AnswerQuery(prompt, 0, 2, 8, 7)]))[0]

    assert asyncio.run(go()).rejected == {"context_overflow": 2}


def test_a_real_process_serves_a_real_teacher(tmp_path: Path) -> None:
    """Through the adapter: the served model goes on, answers, and never shows what was audited."""
    prompt = Prompt("p", (Message("user", QUESTION),))
    chunk = Chunk(0, 9, 12, "12+7=19.", " 19-5=14.", (1, 2, 3), False)
    with local_server(TEACHER) as url:
        config = OpenAIConfig(base_url=url, model="teacher", api_key_env=None, continuation="prefill")
        teacher = OpenAITeacher(config, Store(tmp_path / "answers.sqlite"))
        queries = [ContinueQuery(prompt, chunk, 4, 12, 7), AnswerQuery(prompt, 0, 1, 160, 7)]
        going_on, answer = asyncio.run(teacher.gather(queries))
    assert sum(reply.text.startswith(" 19-5=14.") for reply in going_on.replies) >= 3
    assert "####" in answer.replies[0].text


def test_s12_a_server_that_does_not_start_ends_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no-model"), local_server(tmp_path / "no-model", seconds=60):
        pass


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(TEACHER), "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err
