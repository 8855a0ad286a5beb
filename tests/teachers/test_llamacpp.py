"""llama.cpp: its own server and the Python one, which have the same routes and not the same habits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tiny
from pydantic import ValidationError

from omniopd.errors import ConfigError
from omniopd.registry import TEACHERS
from omniopd.types import Token, Usage
from teachers.llamacpp import LlamacppConfig

URL = "http://127.0.0.1:8080/v1"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
NATIVE = {**SAMPLING, "samplers": ["temperature", "top_p"], "cache_prompt": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("byte-level")
    tiny.byte_level().save_pretrained(path)
    return str(path)


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def completion(bench: Any, text: str, logprobs: Any = None) -> Any:
    choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": "length"}
    usage = {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 24}}
    return bench.Said(body={"id": "c1", "model": "served", "choices": [choice], "usage": usage})


def test_a_last_assistant_message_is_the_open_turn(bench: Any) -> None:
    script = bench.Script([bench.say(" thirty", finish="length")])
    teacher = bench.make("llamacpp", script, continuation="prefill", logprobs=2, thinking="off")
    gather(teacher, bench.continue_query(n=1))
    assert script.urls == [f"{URL}/chat/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "messages": [
                {"role": "user", "content": "What is 6 times 7?"},
                {"role": "assistant", "content": bench.PREFIX},
            ],
            "max_tokens": 16,
            "seed": 100,
            **NATIVE,
            "logprobs": True,
            "top_logprobs": 2,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]


@pytest.mark.parametrize("again", [True, False])
def test_a_prefix_that_is_said_again_is_no_part_of_the_continuation(bench: Any, again: bool) -> None:
    script = bench.Script([bench.say(f"{bench.PREFIX} thirty" if again else " thirty", finish="length")])
    (evidence,) = gather(bench.make("llamacpp", script, continuation="prefill"), bench.continue_query(n=1))
    assert [reply.text for reply in evidence.replies] == [" thirty"]


def test_raw_sends_ids_and_reads_logprobs_in_the_chat_routes_shape(bench: Any, folder: str) -> None:
    entry = {"id": 7, "token": " thirty", "bytes": [32], "logprob": -0.5}
    entry["top_logprobs"] = [{"id": 7, "token": " thirty", "logprob": -0.5}, {"id": 8, "token": " 30", "logprob": -1.5}]
    script = bench.Script([completion(bench, " thirty", {"content": [entry]})])
    teacher = bench.make("llamacpp", script, continuation="raw", tokenizer=folder, logprobs=2, cache_prompt=False)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    ids = tiny.byte_level().encode(f"<|user|>What is 6 times 7?<|assistant|>{bench.PREFIX}", add_special_tokens=False)
    assert script.urls == [f"{URL}/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "prompt": ids,
            "max_tokens": 16,
            "seed": 100,
            **NATIVE,
            "cache_prompt": False,
            "logprobs": 2,
        }
    ]
    assert evidence.replies[0].tokens == (Token(" thirty", -0.5, ((" thirty", -0.5), (" 30", -1.5))),)
    assert evidence.usage == Usage(calls=1, prompt_tokens=30, completion_tokens=4, cache_read_tokens=24)


def test_by_default_each_call_draws_one_text(bench: Any) -> None:
    script = bench.Script(lambda body: bench.say(f" thirty-{body['seed']}", finish="length"))
    (evidence,) = gather(bench.make("llamacpp", script, continuation="prefill"), bench.continue_query(n=3))
    assert [(body["seed"], "n" in body) for body in script.bodies] == [(100, False), (101, False), (102, False)]
    assert len(evidence.replies) == 3


def test_several_texts_are_booked_as_an_estimate_since_the_server_counts_one(bench: Any) -> None:
    script = bench.Script([bench.say(" thirty", " thirty and more", finish="length", usage=(30, 1))])
    (evidence,) = gather(bench.make("llamacpp", script, continuation="prefill", n=True), bench.continue_query(n=2))
    assert script.bodies[0]["n"] == 2
    assert evidence.usage.completion_tokens > 1


def test_the_python_server_gets_text_and_no_field_that_it_has_not(bench: Any, folder: str) -> None:
    logprobs = {"tokens": [" thirty"], "token_logprobs": [-0.5], "top_logprobs": [{" thirty": -0.5}]}
    script = bench.Script([completion(bench, " thirty", logprobs)])
    teacher = bench.make("llamacpp", script, server="python", continuation="raw", tokenizer=folder, logprobs=1)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert script.urls == [f"{URL}/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "prompt": f"<|user|>What is 6 times 7?<|assistant|>{bench.PREFIX}",
            "max_tokens": 16,
            "seed": 100,
            **SAMPLING,
            "logprobs": 1,
        }
    ]
    assert evidence.replies[0].tokens == (Token(" thirty", -0.5, ((" thirty", -0.5),)),)


def test_the_python_server_has_no_prefill(bench: Any, folder: str) -> None:
    assert bench.make("llamacpp", tokenizer=folder).backend.rungs == ("raw", "prefill", "instruct")
    assert bench.make("llamacpp", server="python", tokenizer=folder).backend.rungs == ("raw", "instruct")
    with pytest.raises(ConfigError, match=r"^teacher\.continuation: "):
        bench.make("llamacpp", server="python", continuation="prefill")


def test_what_can_change_an_answer_names_another_teacher(bench: Any) -> None:
    usual = bench.make("llamacpp").fingerprint
    assert bench.make("llamacpp").fingerprint == usual
    assert bench.make("llamacpp", cache_prompt=False).fingerprint != usual
    assert bench.make("llamacpp", server="python").fingerprint != usual


def test_the_native_server_shows_what_it_makes_of_a_chat(bench: Any) -> None:
    script = bench.Script([bench.Said(body={"prompt": "<|user|>What is 6 times 7?<|assistant|>"})])
    shown = asyncio.run(bench.make("llamacpp", script).shown(bench.prompt()))
    assert shown == ("<|user|>What is 6 times 7?<|assistant|>", None)
    assert script.urls == ["http://127.0.0.1:8080/apply-template"]
    assert script.bodies == [{"messages": [{"role": "user", "content": "What is 6 times 7?"}]}]
    assert asyncio.run(bench.make("llamacpp", server="python").shown(bench.prompt())) is None


def said(message: str, kind: str = "invalid_request_error", code: Any = 400) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code}}


TOO_LONG = "request (1034 tokens) exceeds the available context size (1024 tokens), try increasing it"
PYTHON_TOO_LONG = (
    "This model's maximum context length is 512 tokens, however you requested 600 tokens (584 in your prompt)"
)
NO_LOGPROBS = "logprobs is not supported for models created with logits_all=False"


VALIDATION = (
    "1 validation error:\n  {{'type': 'string_type', 'loc': ('body', {}), 'msg': 'Input should be something else'}}"
)


@pytest.mark.parametrize(
    ("status", "payload", "action", "detail"),
    [
        (400, said(TOO_LONG, "exceed_context_size_error"), "drop", "context_overflow"),
        (400, said(PYTHON_TOO_LONG, code="context_length_exceeded"), "drop", "context_overflow"),
        (401, said("Invalid API Key", "authentication_error", 401), "ask", "OMNI_TEST_KEY"),
        (401, {"detail": "Invalid API key"}, "ask", "OMNI_TEST_KEY"),
        (500, said(NO_LOGPROBS, "internal_server_error", None), "downgrade", "logprobs"),
        (500, said(VALIDATION.format("'seed'"), "internal_server_error", None), "downgrade", "seed"),
        (
            500,
            said(VALIDATION.format("'prompt', 'str'"), "internal_server_error", None),
            "downgrade",
            "teacher.server: python",
        ),
        (400, said("Field 'n': Value must be between 1 <= value <= 4, but got 6"), "downgrade", "n"),
        (500, said("boom", "internal_server_error", None), "retry", "boom"),
        (503, said("Loading model", "unavailable_error", 503), "retry", "Loading model"),
    ],
)
def test_an_error_has_one_meaning(bench: Any, status: int, payload: Any, action: str, detail: str) -> None:
    verdict = bench.make("llamacpp").backend.classify(status, payload)
    assert verdict.action == action
    assert detail in (verdict.param, verdict.reason) or detail in verdict.message


def test_what_every_request_states_is_no_extra_field(bench: Any, folder: str) -> None:
    script = bench.Script([completion(bench, " thirty"), bench.say(" 30", finish="length")])
    gather(bench.make("llamacpp", script, continuation="raw", tokenizer=folder, logprobs=1), bench.continue_query(n=1))
    gather(bench.make("llamacpp", script, continuation="prefill", logprobs=1), bench.continue_query(n=1))
    for name in {name for body in script.bodies for name in body}:
        with pytest.raises(ValidationError, match=f"must not hold {name}"):
            LlamacppConfig(model="m", extra_body={name: 1})


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp", "ollama"])
def test_a_bare_address_gets_the_path_of_the_routes(bench: Any, kind: str) -> None:
    settings = TEACHERS.get(kind).Config(type=kind, model="m", base_url="http://127.0.0.1:9/")
    assert settings.base_url == ("http://127.0.0.1:9" if kind == "ollama" else "http://127.0.0.1:9/v1")
    named = TEACHERS.get(kind).Config(type=kind, model="m", base_url="http://127.0.0.1:9/proxy/v1")
    assert named.base_url == "http://127.0.0.1:9/proxy/v1"
