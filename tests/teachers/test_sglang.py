"""SGLang: its chat route, and `/generate` for the rung `raw`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tiny
from pydantic import ValidationError

from omniopd.errors import TeacherError
from omniopd.types import Token, Usage
from teachers.sglang import SglangConfig

ROOT = "http://127.0.0.1:30000"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("byte-level")
    tiny.byte_level().save_pretrained(path)
    return str(path)


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def generated(text: str, kind: str = "length", matched: Any = None, **meta: Any) -> dict[str, Any]:
    finish = {"type": kind, "length": 16} if kind == "length" else {"type": kind, "matched": matched}
    counts = {"id": "r1", "prompt_tokens": 30, "completion_tokens": 4, "cached_tokens": 24}
    return {"text": text, "meta_info": {**counts, "finish_reason": finish, **meta}}


def test_prefill_needs_one_flag_and_does_not_take_the_assistants_header_away(bench: Any) -> None:
    script = bench.Script([bench.say(" thirty", finish="length")])
    gather(bench.make("sglang", script, continuation="prefill", thinking="off", logprobs=2), bench.continue_query(n=1))
    assert script.urls == [f"{ROOT}/v1/chat/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "messages": [
                {"role": "user", "content": "What is 6 times 7?"},
                {"role": "assistant", "content": bench.PREFIX},
            ],
            "max_tokens": 16,
            "seed": 100,
            **SAMPLING,
            "logprobs": True,
            "top_logprobs": 2,
            "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
            "continue_final_message": True,
        }
    ]


def test_by_default_each_call_draws_one_text_with_its_own_seed(bench: Any) -> None:
    script = bench.Script(lambda body: bench.say(f" thirty-{body['seed']}", finish="length"))
    (evidence,) = gather(bench.make("sglang", script, continuation="prefill"), bench.continue_query(n=3))
    assert [(body["seed"], "n" in body) for body in script.bodies] == [(100, False), (101, False), (102, False)]
    assert sorted(reply.text for reply in evidence.replies) == [" thirty-100", " thirty-101", " thirty-102"]


def test_raw_draws_are_a_batch_in_which_each_has_its_own_seed(bench: Any, folder: str) -> None:
    script = bench.Script([bench.Said(body=[generated(" thirty"), generated(" 30", "stop", 9)])])
    teacher = bench.make("sglang", script, continuation="raw", tokenizer=folder, n=True, extra_body={"lora_path": "a"})
    (evidence,) = gather(teacher, bench.continue_query(n=2))
    ids = tiny.byte_level().encode(f"<|user|>What is 6 times 7?<|assistant|>{bench.PREFIX}", add_special_tokens=False)
    drawing = {"max_new_tokens": 16, **SAMPLING, "skip_special_tokens": True}
    assert script.urls == [f"{ROOT}/generate"]
    assert script.bodies == [
        {
            "input_ids": [ids, ids],
            "sampling_params": [{**drawing, "sampling_seed": 100}, {**drawing, "sampling_seed": 101}],
            "lora_path": "a",
        }
    ]
    assert [(reply.text, reply.finish) for reply in evidence.replies] == [(" thirty", "length"), (" 30", "stop")]
    assert evidence.usage == Usage(calls=1, prompt_tokens=30, completion_tokens=8, cache_read_tokens=24)


def test_a_seed_that_is_not_wanted_is_not_sent(bench: Any, folder: str) -> None:
    script = bench.Script([bench.Said(body=[generated(" thirty")])])
    gather(bench.make("sglang", script, continuation="raw", tokenizer=folder, seed=False), bench.continue_query(n=1))
    assert script.bodies[0]["sampling_params"] == [{"max_new_tokens": 16, **SAMPLING, "skip_special_tokens": True}]


def test_logprobs_of_generate_leave_out_the_end_token(bench: Any, folder: str) -> None:
    own = [[-0.5, 11, " th"], [-0.1, 12, "irty"], [-0.2, 9, "<|end|>"]]
    top = [[[-0.5, 11, " th"], [-1.0, 13, " 3"]], [[-0.1, 12, "irty"]], None]
    logprobs = {"output_token_logprobs": own, "output_top_logprobs": top}
    kept = (Token(" th", -0.5, ((" th", -0.5), (" 3", -1.0))), Token("irty", -0.1, (("irty", -0.1),)))
    for seed, (kind, matched) in enumerate([("stop", 9), ("length", None)]):
        script = bench.Script([bench.Said(body=[generated(" thirty", kind, matched, **logprobs)])])
        teacher = bench.make("sglang", script, continuation="raw", tokenizer=folder, logprobs=2)
        (evidence,) = gather(teacher, bench.continue_query(n=1, seed=seed))
        sent = {name: script.bodies[0][name] for name in script.bodies[0] if "logprob" in name}
        assert sent == {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
        assert evidence.replies[0].tokens == kept


@pytest.mark.parametrize(
    "payload",
    [
        [],
        {},
        [{"text": None, "meta_info": {}}],
        ["x"],
        [generated(" x", output_token_logprobs=[[-1, 2]])],
        [generated(" x", output_token_logprobs=[[None, 2, " x"]])],
    ],
)
def test_a_reply_of_another_shape_is_tried_again_and_then_a_hole(bench: Any, folder: str, payload: Any) -> None:
    script = bench.Script([bench.Said(body=payload), bench.Said(body=[generated(" thirty")])])
    teacher = bench.make("sglang", script, continuation="raw", tokenizer=folder, logprobs=1)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert script.calls == 2
    assert [reply.text for reply in evidence.replies] == [" thirty"]


def test_an_aborted_draw_is_a_counted_hole(bench: Any, folder: str) -> None:
    script = bench.Script([bench.Said(body=[generated(" thirty"), generated(" thi", "abort")])])
    teacher = bench.make("sglang", script, continuation="raw", tokenizer=folder, n=True)
    (evidence,) = gather(teacher, bench.continue_query(n=2))
    assert ([reply.text for reply in evidence.replies], evidence.rejected) == ([" thirty"], {"error": 1})


LONGER = "The input (5000 tokens) is longer than the model's context length (4096 tokens)."
TOGETHER = (
    "Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of 4100."
)


@pytest.mark.parametrize(
    ("status", "payload", "action", "detail"),
    [
        (400, {"error": {"message": LONGER}}, "drop", "context_overflow"),
        (
            400,
            {"object": "error", "message": TOGETHER, "type": "BadRequestError", "code": 400},
            "drop",
            "context_overflow",
        ),
        (400, {"error": {"message": "top_p must be in (0, 1], got 2."}}, "downgrade", "top_p"),
        (400, {"error": "unknown field `zork`, expected one of `rid`, `text`"}, "downgrade", "zork"),
        (401, {"error": "Unauthorized"}, "ask", "OMNI_TEST_KEY"),
        (503, {"detail": "The request queue is full."}, "retry", "queue is full"),
    ],
)
def test_an_error_has_one_meaning(bench: Any, status: int, payload: Any, action: str, detail: str) -> None:
    verdict = bench.make("sglang").backend.classify(status, payload)
    assert verdict.action == action
    assert detail in (verdict.param, verdict.reason) or detail in verdict.message


def test_what_every_request_states_is_no_extra_field(bench: Any, folder: str) -> None:
    script = bench.Script([bench.Said(body=[generated(" thirty")]), bench.say(" 30", finish="length")])
    gather(bench.make("sglang", script, continuation="raw", tokenizer=folder, logprobs=1), bench.continue_query(n=1))
    gather(bench.make("sglang", script, continuation="prefill", logprobs=1), bench.continue_query(n=1))
    for name in {name for body in script.bodies for name in body}:
        with pytest.raises(ValidationError, match=f"must not hold {name}"):
            SglangConfig(model="m", extra_body={name: 1})


def test_a_server_that_is_not_there_is_named(bench: Any) -> None:
    teacher = bench.make("sglang", base_url="http://127.0.0.1:9/v1", continuation="prefill")
    with pytest.raises(TeacherError, match=r"http://127\.0\.0\.1:9/v1 can't be reached .* teacher\.base_url"):
        gather(teacher, bench.continue_query(n=1))
