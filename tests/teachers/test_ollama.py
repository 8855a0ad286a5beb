"""Ollama: its native chat route, and `/api/generate` past the model's template for the rung `raw`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

from omniopd.errors import TeacherError
from omniopd.types import Token, Usage
from teachers.ollama import OllamaConfig

ROOT = "http://127.0.0.1:11434"
OPTIONS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "num_ctx": 8192,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("byte-level")
    tiny.byte_level().save_pretrained(path)
    return str(path)


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def chatted(bench: Any, text: Any, reason: Any = "length", thinking: str = "", **more: Any) -> Any:
    message = {"role": "assistant", "content": text} | ({"thinking": thinking} if thinking else {})
    counts = {"prompt_eval_count": 30, "eval_count": 4}
    return bench.Said(
        body={"model": "m:latest", "message": message, "done": True, "done_reason": reason, **counts, **more}
    )


def generated(bench: Any, text: Any, **more: Any) -> Any:
    counts = {"prompt_eval_count": 30, "eval_count": 4}
    return bench.Said(
        body={"model": "m:latest", "response": text, "done": True, "done_reason": "length", **counts, **more}
    )


def test_a_last_assistant_message_is_the_open_turn(bench: Any) -> None:
    entry = {"token": " thirty", "logprob": -0.5, "bytes": [32], "top_logprobs": [{"token": " 30", "logprob": -1.5}]}
    script = bench.Script([chatted(bench, " thirty", logprobs=[entry])])
    teacher = bench.make("ollama", script, continuation="prefill", thinking="off", logprobs=2)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert script.urls == [f"{ROOT}/api/chat"]
    assert script.bodies == [
        {
            "model": "scripted",
            "messages": [
                {"role": "user", "content": "What is 6 times 7?"},
                {"role": "assistant", "content": bench.PREFIX},
            ],
            "stream": False,
            "truncate": False,
            "shift": False,
            "options": {**OPTIONS, "num_predict": 16, "seed": 100},
            "logprobs": True,
            "top_logprobs": 2,
            "think": False,
        }
    ]
    assert evidence.replies[0].tokens == (Token(" thirty", -0.5, ((" 30", -1.5),)),)
    assert evidence.usage == Usage(calls=1, prompt_tokens=30, completion_tokens=4)


def test_an_answer_leaves_thinking_to_the_model(bench: Any) -> None:
    script = bench.Script([chatted(bench, "It is 42.", "stop")])
    (answers,) = gather(bench.make("ollama", script, seed=False, num_ctx=4096), bench.answer_query(n=1))
    assert script.bodies == [
        {
            "model": "scripted",
            "messages": [{"role": "user", "content": "What is 6 times 7?"}],
            "stream": False,
            "truncate": False,
            "shift": False,
            "options": {**OPTIONS, "num_predict": 64, "num_ctx": 4096},
        }
    ]
    assert [(reply.text, reply.finish) for reply in answers.replies] == [("It is 42.", "stop")]


def test_raw_goes_past_the_template_with_thinking_off(bench: Any, folder: str) -> None:
    script = bench.Script([generated(bench, " thirty")])
    (evidence,) = gather(
        bench.make("ollama", script, continuation="raw", tokenizer=folder, extra_body={"keep_alive": "1h"}),
        bench.continue_query(n=1),
    )
    assert script.urls == [f"{ROOT}/api/generate"]
    assert script.bodies == [
        {
            "model": "scripted",
            "prompt": f"<|user|>What is 6 times 7?<|assistant|>{bench.PREFIX}",
            "raw": True,
            "stream": False,
            "truncate": False,
            "shift": False,
            "options": {**OPTIONS, "num_predict": 16, "seed": 100},
            "think": False,
            "keep_alive": "1h",
        }
    ]
    assert [reply.text for reply in evidence.replies] == [" thirty"]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_r2_a_bos_that_the_server_writes_is_not_sent(bench: Any, tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = tiny.pieces.__wrapped__()  # a fresh one: it is changed
    bos = tokenizer.convert_tokens_to_ids("<s>")
    if adds_bos:
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save_pretrained(tmp_path / "bos")
    script = bench.Script([generated(bench, " thirty")])
    gather(bench.make("ollama", script, continuation="raw", tokenizer=str(tmp_path / "bos")), bench.continue_query(n=1))
    as_the_server_reads_it = tokenizer(script.bodies[0]["prompt"]).input_ids
    assert as_the_server_reads_it.count(bos) == 1
    assert as_the_server_reads_it[0] == bos


def test_each_call_draws_one_text_with_its_own_seed(bench: Any) -> None:
    script = bench.Script(lambda body: chatted(bench, f" thirty-{body['options']['seed']}"))
    (evidence,) = gather(bench.make("ollama", script, continuation="prefill", n="auto"), bench.continue_query(n=3))
    assert sorted(body["options"]["seed"] for body in script.bodies) == [100, 101, 102]
    assert sorted(reply.text for reply in evidence.replies) == [" thirty-100", " thirty-101", " thirty-102"]


def test_a_budget_that_went_into_thought_is_a_reason_of_its_own(bench: Any) -> None:
    script = bench.Script([chatted(bench, "", thinking="Six times seven…")])
    (evidence,) = gather(bench.make("ollama", script, continuation="prefill"), bench.continue_query(n=1))
    assert evidence.rejected == {"only_reasoning": 1}


@pytest.mark.parametrize(
    ("reason", "rejected", "finish"),
    [
        ("stop", {}, "stop"),
        ("length", {}, "length"),
        ("limit", {}, "length"),
        ("unload", {"error": 1}, None),
        (None, {"error": 1}, None),
    ],
)
def test_how_a_text_ended(bench: Any, reason: Any, rejected: dict[str, int], finish: str | None) -> None:
    script = bench.Script([chatted(bench, " thirty", reason)])
    (evidence,) = gather(bench.make("ollama", script, continuation="prefill"), bench.continue_query(n=1))
    assert (evidence.rejected, [reply.finish for reply in evidence.replies]) == (rejected, [finish] if finish else [])


def test_usage_that_is_not_told_is_an_estimate_and_not_a_zero(bench: Any) -> None:
    said = {"model": "m", "message": {"content": " thirty"}, "done": True, "done_reason": "length"}
    script = bench.Script([bench.Said(body=said), chatted(bench, " thirty", prompt_eval_count=0)])
    teacher = bench.make("ollama", script, continuation="prefill")
    assert gather(teacher, bench.continue_query(n=1))[0].usage.completion_tokens > 0
    cached = gather(teacher, bench.continue_query(n=1, seed=5))[0].usage
    assert (cached.prompt_tokens, cached.completion_tokens) == (0, 4)


@pytest.mark.parametrize(
    "payload", [{}, [], {"message": None}, {"message": {"content": None}}, {"response": " x", "done_reason": "stop"}]
)
def test_a_reply_without_text_is_tried_again(bench: Any, payload: Any) -> None:
    script = bench.Script([bench.Said(body=payload), chatted(bench, " thirty")])
    (evidence,) = gather(bench.make("ollama", script, continuation="prefill"), bench.continue_query(n=1))
    assert script.calls == 2
    assert [reply.text for reply in evidence.replies] == [" thirty"]


@pytest.mark.parametrize(
    ("status", "error", "action", "detail"),
    [
        (404, "model 'nope' not found", "ask", "correct teacher.model"),
        (400, "the input length exceeds the context length", "drop", "context_overflow"),
        (400, "top_logprobs must be between 0 and 20", "downgrade", "logprobs"),
        (400, '"m" does not support thinking', "downgrade", "thinking"),
        (401, "unauthorized", "ask", "OMNI_TEST_KEY"),
        (500, "llama runner process has terminated", "retry", "terminated"),
        (503, "server busy, please try again. maximum pending requests exceeded", "throttle", "server busy"),
    ],
)
def test_an_error_has_one_meaning(bench: Any, status: int, error: str, action: str, detail: str) -> None:
    verdict = bench.make("ollama").backend.classify(status, {"error": error})
    assert verdict.action == action
    assert detail in (verdict.param, verdict.reason) or detail in verdict.message


def test_an_error_inside_a_200_is_an_error(bench: Any) -> None:
    assert bench.make("ollama").backend.classify(200, {"error": "an error was encountered"}).action == "retry"
    assert bench.make("ollama").backend.classify(200, chatted(bench, " thirty").body) is None


def test_auto_looks_whether_the_renderer_leaves_the_turn_open(bench: Any) -> None:
    def closes_every_turn(body: dict[str, Any]) -> Any:
        last = body["messages"][-1]
        if last["role"] == "user" and "<begun>" in last["content"]:
            return chatted(bench, last["content"].split("<last_piece>")[1].split("</last_piece>")[0] + " thirty")
        return chatted(bench, "Let me answer this question once more, from its very beginning on.", "stop")

    teacher = bench.make("ollama", bench.Script(closes_every_turn))
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert teacher.capabilities.continuation == "instruct"
    assert [reply.text for reply in evidence.replies] == [" thirty"]


def test_a_model_that_is_not_there_stops_the_run(bench: Any) -> None:
    script = bench.Script([bench.Said(404, {"error": "model 'scripted' not found"})])
    with pytest.raises(TeacherError, match=r"no model 'scripted' at http://127\.0\.0\.1:11434 .*teacher\.model"):
        gather(bench.make("ollama", script, continuation="prefill"), bench.continue_query(n=1))


def test_the_context_is_part_of_the_teachers_name(bench: Any) -> None:
    assert bench.make("ollama").fingerprint != bench.make("ollama", num_ctx=4096).fingerprint


def test_what_every_request_states_is_no_extra_field(bench: Any, folder: str) -> None:
    script = bench.Script([generated(bench, " thirty"), chatted(bench, " 30")])
    gather(bench.make("ollama", script, continuation="raw", tokenizer=folder, logprobs=1), bench.continue_query(n=1))
    gather(bench.make("ollama", script, continuation="prefill", logprobs=1), bench.continue_query(n=1))
    for name in {name for body in script.bodies for name in body}:
        with pytest.raises(ValidationError, match=f"must not hold {name}"):
            OllamaConfig(model="m", extra_body={name: 1})
