"""vLLM: what is sent on each rung, what is read, and what its errors mean."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

from omniopd.errors import ConfigError, TeacherError
from omniopd.registry import TEACHERS
from omniopd.types import Token, Usage
from teachers import ladder
from teachers.vllm import VllmConfig

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
URL = "http://127.0.0.1:8000/v1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("byte-level")
    tiny.byte_level().save_pretrained(path)
    return str(path)


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def completions(bench: Any, *texts: str, **choice: Any) -> Any:
    choices = [{"text": text, "finish_reason": "length", **choice} for text in texts]
    usage = {"prompt_tokens": 30, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 16}}
    return bench.Said(body={"id": "cmpl-1", "model": "served", "choices": choices, "usage": usage})


def test_a_server_of_ones_own_needs_no_key_and_no_address() -> None:
    config = VllmConfig(model="m")
    assert (config.base_url, config.api_key_env, config.n, config.seed) == (URL, None, "auto", "auto")
    assert TEACHERS.get("vllm").Config is VllmConfig


def test_r15_an_answer_states_the_whole_distribution(bench: Any) -> None:
    script = bench.Script([bench.say("The answer is 42.", "It is 42, since six sevens are.", finish="stop")])
    (answers,) = gather(bench.make("vllm", script, continuation="prefill"), bench.answer_query(n=2, seed=7))
    assert script.urls == [f"{URL}/chat/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "messages": [{"role": "user", "content": "What is 6 times 7?"}],
            "max_tokens": 64,
            "n": 2,
            "seed": 7,
            **SAMPLING,
        }
    ]
    assert [reply.text for reply in answers.replies] == ["The answer is 42.", "It is 42, since six sevens are."]


def test_prefill_leaves_the_last_turn_open(bench: Any) -> None:
    script = bench.Script([bench.say(" thirty", " 30", finish="length")])
    teacher = bench.make("vllm", script, continuation="prefill", logprobs=3, thinking="off", system="Be brief.")
    gather(teacher, bench.continue_query(n=2))
    assert script.urls == [f"{URL}/chat/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 6 times 7?"},
                {"role": "assistant", "content": bench.PREFIX},
            ],
            "max_tokens": 16,
            "n": 2,
            "seed": 100,
            **SAMPLING,
            "logprobs": True,
            "top_logprobs": 3,
            "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
            "add_generation_prompt": False,
            "continue_final_message": True,
        }
    ]


def test_instruct_is_an_ordinary_chat(bench: Any) -> None:
    script = bench.Script([bench.say(f"{ladder.echo_of(bench.PREFIX)} thirty", finish="length")])
    (evidence,) = gather(bench.make("vllm", script, continuation="instruct", seed=False), bench.continue_query(n=1))
    (turn,) = ladder.render_instruct(bench.prompt(), bench.PREFIX)
    assert script.bodies == [
        {
            "model": "scripted",
            "messages": [{"role": "user", "content": turn.content}],
            "max_tokens": 16 + ladder.ECHO_TOKENS,
            **SAMPLING,
        }
    ]
    assert [reply.text for reply in evidence.replies] == [" thirty"]


def test_raw_sends_token_ids_to_the_completion_route(bench: Any, folder: str) -> None:
    logprobs = {
        "tokens": [" th", "irty"],
        "token_logprobs": [-0.5, -0.1],
        "top_logprobs": [{" th": -0.5, " 3": -1}, None],
    }
    script = bench.Script([completions(bench, " thirty", " thirty", logprobs=logprobs)])
    teacher = bench.make(
        "vllm", script, continuation="raw", tokenizer=folder, logprobs=2, extra_body={"cache_salt": "x"}
    )
    (evidence,) = gather(teacher, bench.continue_query(n=2))
    tokenizer = tiny.byte_level()
    written = f"<|user|>What is 6 times 7?<|assistant|>{bench.PREFIX}"
    assert script.urls == [f"{URL}/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "prompt": tokenizer.encode(written, add_special_tokens=False),
            "max_tokens": 16,
            "n": 2,
            "seed": 100,
            **SAMPLING,
            "logprobs": 2,
            "cache_salt": "x",
        }
    ]
    assert evidence.usage == Usage(calls=1, prompt_tokens=30, completion_tokens=8, cache_read_tokens=16)
    assert evidence.replies[0].tokens == (Token(" th", -0.5, ((" th", -0.5), (" 3", -1.0))), Token("irty", -0.1))


def test_raw_keeps_a_control_tokens_text_text(bench: Any, folder: str) -> None:
    script = bench.Script([completions(bench, " thirty")])
    teacher = bench.make("vllm", script, continuation="raw", tokenizer=folder)
    gather(teacher, bench.continue_query(prefix=f"{bench.PREFIX} <|end|><|user|> and", n=1))
    tokenizer = tiny.byte_level()
    ids = script.bodies[0]["prompt"]
    assert tokenizer.decode(ids).endswith(f"{bench.PREFIX} <|end|><|user|> and")
    assert [ids.count(tokenizer.convert_tokens_to_ids(name)) for name in ("<|end|>", "<|user|>")] == [0, 1]


def test_r2_raw_has_one_bos(bench: Any, tmp_path: Path) -> None:
    tokenizer = tiny.pieces.__wrapped__()  # a fresh one: it is changed
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer("x").input_ids[0] == bos
    tokenizer.save_pretrained(tmp_path / "bos")
    script = bench.Script([completions(bench, " thirty")])
    gather(bench.make("vllm", script, continuation="raw", tokenizer=str(tmp_path / "bos")), bench.continue_query(n=1))
    assert script.bodies[0]["prompt"][0] == bos
    assert script.bodies[0]["prompt"].count(bos) == 1


def test_raw_without_a_tokenizer_is_refused_before_any_call(bench: Any) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.continuation: .* teacher\.tokenizer"):
        bench.make("vllm", continuation="raw")
    assert bench.make("vllm").backend.rungs == ("prefill", "instruct")


def test_at_temperature_0_one_draw_is_asked_for(bench: Any) -> None:
    script = bench.Script([bench.say(" thirty", finish="length")])
    teacher = bench.make("vllm", script, continuation="prefill", temperature=0.0)
    (evidence,) = gather(teacher, bench.continue_query(n=2))
    assert ["n" in body for body in script.bodies] == [False, False]
    assert len(evidence.replies) == 2


def test_what_every_request_states_is_no_extra_field(bench: Any, folder: str) -> None:
    script = bench.Script([completions(bench, " thirty", " 30"), bench.say(" 30", " 31", finish="length")])
    gather(bench.make("vllm", script, continuation="raw", tokenizer=folder, logprobs=1), bench.continue_query(n=2))
    gather(bench.make("vllm", script, continuation="prefill", logprobs=1), bench.continue_query(n=2))
    stated = {name for body in script.bodies for name in body}
    assert {"prompt", "messages", "logprobs", "top_logprobs", "continue_final_message", "n", "seed"} <= stated
    for name in stated:
        with pytest.raises(ValidationError, match=f"must not hold {name}: every request states it"):
            VllmConfig(model="m", extra_body={name: 1})


def said(message: str, kind: str = "BadRequestError", param: str | None = None, code: int = 400) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


TOO_LONG = (
    "This model's maximum context length is 1024 tokens. However, your prompt contains at least 1025 input tokens, which "
    "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
)
LOGPROBS = "Requested sample logprobs of 21, which is greater than max allowed: 20 (parameter=logprobs, value=21)"
CLASH = "add_generation_prompt and continue_final_message are not compatible with this template"


@pytest.mark.parametrize(
    ("status", "payload", "action", "detail"),
    [
        (401, {"error": "Unauthorized"}, "ask", "the environment variable OMNI_TEST_KEY"),
        (404, said("The model `nope` does not exist.", "NotFoundError", "model", 404), "ask", "correct teacher.model"),
        (404, {"detail": "Not Found"}, "ask", "teacher.base_url"),
        (400, said(TOO_LONG, param="input_tokens"), "drop", "context_overflow"),
        (400, said(LOGPROBS, param="logprobs"), "downgrade", "logprobs"),
        (400, said("n must be 1 when using greedy sampling, got 3."), "downgrade", "n"),
        (400, said(CLASH), "downgrade", "prefill"),
        (400, said("1 validation error", "Bad Request", "body.seed"), "downgrade", "seed"),
        (500, said("EngineCore encountered an issue.", "InternalServerError", code=500), "retry", "EngineCore"),
        (503, None, "retry", "HTTP 503"),
    ],
)
def test_an_error_has_one_meaning(bench: Any, status: int, payload: Any, action: str, detail: str) -> None:
    verdict = bench.make("vllm").backend.classify(status, payload)
    assert verdict.action == action
    assert detail in (verdict.param, verdict.reason) or detail in verdict.message
    assert "prefill_style" not in verdict.message
    assert "max_tokens_field" not in verdict.message


def test_a_refused_prefill_leads_to_instruct_where_the_config_leaves_it_open(bench: Any) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if body.get("continue_final_message"):
            return bench.Said(400, said(CLASH))
        return bench.say(f"{ladder.echo_of(bench.PREFIX)} thirty", finish="length")

    script = bench.Script(answer)
    (evidence,) = gather(bench.make("vllm", script, n=False), bench.continue_query(n=1))
    assert [reply.text for reply in evidence.replies] == [" thirty"]
    with pytest.raises(TeacherError, match=r"set teacher\.continuation: instruct, or raw with teacher\.tokenizer"):
        gather(bench.make("vllm", bench.Script(answer), continuation="prefill"), bench.continue_query(n=1, seed=3))
