"""A vLLM server as the student's pen: a scripted one in its place. See tests/contract for the real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_vllm
import httpx
import pytest
import tenacity
import tiny
import torch
from fake_vllm import Copy
from pydantic import ValidationError

from omniopd.errors import ConfigError, StudentError
from omniopd.registry import SAMPLERS
from omniopd.types import Rollout
from students.policy import Policy, StudentSettings
from students.ranks import Ranks
from students.samplers import vllm_server
from students.samplers.vllm_server import VllmServerRollouts, VllmServerSampler

PROMPTS = [tiny.prompt(f"What is {i} + 7?", str(i)) for i in range(5)]
CANARY = "sk-CanaryKey-5f2d81c09a7e"


@pytest.fixture
def copy() -> Copy:
    return Copy()


@pytest.fixture
def student(tied_folder: Path) -> Policy:
    return tiny.policy(tied_folder)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, copy: Copy, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A sampler, and the requests that reach its server."""
    made: list[VllmServerSampler] = []
    plain = httpx.Client
    monkeypatch.setattr(vllm_server, "WAIT", tenacity.wait_none())

    def build(student: Policy, first: Any = (), says: Any = None, **settings: Any) -> Any:
        transport, requests = fake_vllm.server(copy, first, says)
        monkeypatch.setattr(httpx, "Client", lambda **given: plain(transport=transport, **given))
        given = {"base_url": "http://student:8000/v1/", "model": "student", "weights": tmp_path / "weights", **settings}
        made.append(VllmServerSampler(VllmServerRollouts(**given), student, 5))
        return made[-1], requests

    yield build
    for sampler in made:
        sampler.close()


def learn(student: Policy) -> None:
    """Other weights."""
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.1)


def test_found_by_name(tmp_path: Path) -> None:
    assert SAMPLERS.get("vllm_server") is VllmServerSampler
    chosen = {"type": "vllm_server", "base_url": "http://a:1", "model": "m", "weights": str(tmp_path)}
    settings = StudentSettings(path="x", rollouts=chosen)  # type: ignore[arg-type]
    assert settings.rollouts == VllmServerRollouts(base_url="http://a:1", model="m", weights=tmp_path)
    with pytest.raises(ValidationError, match="needs an address like"):
        VllmServerRollouts(base_url="a:1", model="m", weights=tmp_path)


def test_its_rollouts_are_those_of_the_embedded_sampler(student: Policy, make: Callable[..., Any]) -> None:
    sampler, _ = make(student, concurrency=3)
    for step in (1, 2):
        sampler.push(step - 1)
        heard: dict[int, Rollout] = {}
        rollouts = sampler.sample(PROMPTS, step, rows=[1, 3, 5, 7, 9], ended=heard.__setitem__)
        expected = tiny.sampler(student, 5).sample(PROMPTS, step, rows=[1, 3, 5, 7, 9])
        for one, other in zip(rollouts, expected, strict=True):
            assert (one.ids, one.text, one.ends, one.finish) == (other.ids, other.text, other.ends, other.finish)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert one.entropy == pytest.approx(other.entropy, abs=1e-5)
            assert one.version == step - 1
        assert [heard[place] for place in range(5)] == rollouts
        assert sampler.gap is not None and sampler.gap.p99 < 1e-5
        learn(student)
    greedy = [rollout.ids for rollout in tiny.sampler(student).greedy(PROMPTS)]
    sampler.push(2)
    assert [rollout.ids for rollout in sampler.greedy(PROMPTS)] == greedy


def test_r4_ids_go_in_and_ids_come_out(student: Policy, make: Callable[..., Any]) -> None:
    sampler, requests = make(student)
    rollouts = sampler.sample(PROMPTS[:1], 1)
    assert [request.url.path for request in requests] == ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"]
    body = json.loads(requests[-1].content)
    assert body["prompt"] == list(student.prompt_ids(PROMPTS[0])) and body["model"] == "student"
    assert rollouts[0].text == student.decode(list(rollouts[0].ids))  # and not the server's "?"


def test_weights_pass_through_the_folder_and_leave_it(
    student: Policy, make: Callable[..., Any], copy: Copy, tmp_path: Path
) -> None:
    sampler, _ = make(student)
    sampler.push(3)
    assert copy.loaded == [str(tmp_path / "weights" / "version-3")]
    assert not list((tmp_path / "weights").iterdir())


def test_s6_a_push_that_is_skipped_is_caught(student: Policy, make: Callable[..., Any]) -> None:
    sampler, _ = make(student)
    sampler.sample(PROMPTS, 1)
    learn(student)
    with pytest.raises(
        StudentError, match=r"^student.rollouts: log-probs of the vLLM server and the trainer differ by"
    ):
        sampler.sample(PROMPTS, 2)


def test_s6_a_prompt_kept_from_before_the_push_is_caught(student: Policy, make: Callable[..., Any], copy: Copy) -> None:
    sampler, _ = make(student)
    sampler.sample(PROMPTS, 1)
    learn(student)
    copy.forgets = False
    sampler.push(1)
    with pytest.raises(StudentError, match="differ by"):
        sampler.sample(PROMPTS, 2)


def test_the_key_is_sent_and_never_told(
    student: Policy, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^student.rollouts.api_key_env: the variable STUDENT_KEY is not set$"):
        make(student, api_key_env="STUDENT_KEY")
    monkeypatch.setenv("STUDENT_KEY", CANARY)
    refused = httpx.Response(401, json={"error": "Unauthorized"})
    sampler, requests = make(student, says=lambda path: refused, api_key_env="STUDENT_KEY")
    with pytest.raises(
        StudentError, match=r"^student.rollouts.api_key_env: .* answers 401 to /collective_rpc"
    ) as caught:
        sampler.push(0)
    assert requests[0].headers["Authorization"] == f"Bearer {CANARY}"
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("fault", [httpx.ConnectError("refused"), httpx.ReadTimeout(""), httpx.Response(503)])
def test_a_call_that_does_not_get_through_is_tried_again(student: Policy, make: Callable[..., Any], fault: Any) -> None:
    sampler, requests = make(student, first=[fault, fault])
    sampler.push(0)
    assert len(requests) == 4
    failing, _ = make(student, first=[fault] * 5)
    with pytest.raises(
        StudentError, match=r"^student.rollouts.*(base_url: http://student:8000 does not|answers 503)"
    ) as caught:
        failing.push(0)
    assert "\n" not in str(caught.value)


REFUSED = [
    ("/collective_rpc", 404, "Not Found", r"^student.rollouts: .*so no weights can be pushed.*VLLM_SERVER_DEV_MODE=1"),
    ("/collective_rpc", 500, "no\nfiles", r"^student.rollouts.weights: .*: no files; does it see the folder"),
    ("/v1/completions", 404, "no model `x`", r"^student.rollouts.model: .* answers 404 .*: no model `x`$"),
    (
        "/v1/completions",
        400,
        "too long",
        r"^student.rollouts: the vLLM server answers 400 to /v1/completions: too long$",
    ),
]


@pytest.mark.parametrize(("path", "status", "text", "message"), REFUSED)
def test_a_refusal_is_one_line_and_not_tried_again(
    student: Policy, make: Callable[..., Any], path: str, status: int, text: str, message: str
) -> None:
    sampler, requests = make(student, says=lambda p: httpx.Response(status, text=text) if p == path else None)
    with pytest.raises(StudentError, match=message) as caught:
        sampler.sample(PROMPTS[:1], 1)
    assert "\n" not in str(caught.value)
    assert [request.url.path for request in requests].count(path) == 1


NO_LOGPROBS = {"token_ids": [3, 4], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}
SAID = [
    ({"text": "a"}, "returns no token ids"),
    (NO_LOGPROBS, "returns 1 log-probs of 2 tokens"),
    ({**NO_LOGPROBS, "finish_reason": "abort"}, "ended a response with 'abort'"),
]


@pytest.mark.parametrize(("choice", "message"), SAID)
def test_r4_an_answer_without_its_ids_is_refused(
    student: Policy, make: Callable[..., Any], choice: Any, message: str
) -> None:
    def says(path: str) -> httpx.Response | None:
        return httpx.Response(200, json={"choices": [choice]}) if path == "/v1/completions" else None

    sampler, _ = make(student, says=says)
    with pytest.raises(StudentError, match=message):
        sampler.sample(PROMPTS[:1], 1)


def test_s6_a_prefix_cache_that_is_kept_stops_the_push(student: Policy, make: Callable[..., Any]) -> None:
    kept = httpx.Response(200, json={"success": False})
    sampler, _ = make(student, says=lambda path: kept if path == "/reset_prefix_cache" else None)
    with pytest.raises(StudentError, match="keeps its prefix cache"):
        sampler.push(0)


def test_of_several_processes_the_main_one_pushes_and_the_others_wait(
    student: Policy, make: Callable[..., Any], copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    for index in (0, 1):
        ranks = Ranks()
        ranks.index = index
        monkeypatch.setattr(ranks, "all", lambda part: waits.append(len(copy.loaded)))
        sampler, requests = make(student)
        sampler.ranks = ranks
        sampler.push(4)
        assert sampler.version == 4
        assert len(requests) == (2 if index == 0 else 0)
    assert waits == [0, 1, 1, 1] and len(copy.loaded) == 1
