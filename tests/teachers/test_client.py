"""A teacher behind an API: what is asked, in which order, what is kept, and that every draw is accounted for."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from omniopd.errors import StoreError
from omniopd.registry import TEACHERS
from omniopd.types import Answers, Continuations, Message, Prompt, Reply, Usage
from teachers import ladder
from teachers.openai import OpenAIConfig, OpenAITeacher

RESTART = "Let us multiply six by seven, step by step. First, six times five is 30."


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def honest(bench: Any) -> Any:
    """A server whose choice j depends on the seed it would have: seed + j."""
    return bench.Script(
        lambda body: bench.say(
            *(f" thirty-{body.get('seed', 0) + j}" for j in range(body.get("n", 1))), finish="length"
        )
    )


def test_found_by_name() -> None:
    assert TEACHERS.get("openai") is OpenAITeacher


def test_l13_l3_every_reject_has_its_reason_and_the_counts_add_up(bench: Any) -> None:
    texts = [
        " thirty",
        " thirty",
        " 30",
        RESTART,
        "I'm sorry, but I can't help with that.",
        "",
        "Here is the rest of it",
    ]
    script = bench.Script([bench.say(*texts)])
    (evidence,) = gather(bench.teacher(script), bench.continue_query(n=7))
    assert isinstance(evidence, Continuations)
    assert [reply.text for reply in evidence.replies] == [" thirty", " thirty", " 30"]
    assert evidence.rejected == {"restart": 1, "refusal": 1, "empty": 1, "meta": 1}
    assert len(evidence.replies) + sum(evidence.rejected.values()) == evidence.query.n
    stats = bench.store.stats()
    assert stats.answers == 3
    assert stats.rejected == {"restart": 1, "empty": 1, "meta": 1}
    assert stats.holes == {"refusal": 1}


def test_l4_a_teacher_that_always_answers_nothing_leaves_no_reply(bench: Any) -> None:
    (evidence,) = gather(bench.teacher(bench.Script([bench.say("", "", "", "")])), bench.continue_query())
    assert (evidence.replies, evidence.rejected) == ((), {"empty": 4})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"finish": "content_filter"}, "filtered"),
        ({"refusal": "I will not."}, "refusal"),
        ({"finish": None}, "error"),
        ({"finish": "tool_calls"}, "error"),
    ],
)
def test_s9_what_is_no_answer_is_not_stored_and_is_asked_again(bench: Any, said: Any, reason: str) -> None:
    script = bench.Script([bench.say(" x", " y", **said), bench.say(" thirty", " 30")])
    teacher, query = bench.teacher(script), bench.continue_query(n=2)
    assert gather(teacher, query)[0].rejected == {reason: 2}
    assert bench.store.stats().answers == 0
    assert b" x" not in bench.path.read_bytes()
    assert len(gather(teacher, query)[0].replies) == 2


@pytest.mark.parametrize("where", [{"reasoning_content": "hm"}, {"reasoning": "hm"}])
def test_l14_hidden_reasoning_only(bench: Any, where: Any) -> None:
    script = bench.Script([bench.say("", None, finish="length", **where)])
    (evidence,) = gather(bench.teacher(script), bench.continue_query(n=2))
    assert evidence.rejected == {"only_reasoning": 2}


def test_l14_hidden_reasoning_known_by_its_token_count(bench: Any) -> None:
    said = bench.say("", finish="length")
    said.body["usage"]["completion_tokens_details"] = {"reasoning_tokens": 16}
    (evidence,) = gather(bench.teacher(bench.Script([said])), bench.continue_query(n=1))
    assert evidence.rejected == {"only_reasoning": 1}


def test_s9_two_draws_have_two_keys(bench: Any) -> None:
    ask = bench.teacher(honest(bench)).manner.ask(bench.continue_query())
    others = [
        replace(ask, seed=ask.seed + 1),
        replace(ask, max_tokens=17),
        replace(ask, temperature=0.5),
        replace(ask, top_p=0.5),
        replace(ask, teacher="x"),
        replace(ask, rung="instruct"),
        replace(ask, messages=ask.messages[:1]),
    ]
    keys = [key for one in (ask, *others) for key in one.keys(5)]
    assert len(set(keys)) == 40
    assert ask.keys(5) == ask.keys(9)[:5]


def test_s10_the_second_gather_calls_nobody(bench: Any) -> None:
    script = bench.Script([bench.say(" thirty", "", RESTART, " 30", usage=(7, 9))])
    query = bench.continue_query()
    (first,) = gather(bench.teacher(script), query)
    (second,) = gather(bench.teacher(script), query)
    assert script.calls == 1
    assert (first.replies, first.rejected) == (second.replies, second.rejected)
    assert first.usage == Usage(1, 0, 7, 9)
    assert second.usage == Usage(0, 1)


def test_s10_only_the_missing_draws_are_asked_for(bench: Any) -> None:
    script = honest(bench)
    whole = bench.continue_query(n=6)
    (two,) = gather(bench.teacher(script), replace(whole, n=2))
    (six,) = gather(bench.teacher(script), whole)
    assert [(body.get("n"), body["seed"]) for body in script.bodies] == [(2, 100), (4, 102)]
    assert six.replies[:2] == two.replies
    assert [reply.text for reply in six.replies] == [f" thirty-{seed}" for seed in range(100, 106)]
    assert six.usage.cached_calls == 0


def test_holes_between_stored_draws_are_filled_without_a_twin(bench: Any) -> None:
    refusing = bench.say(" a", "I'm sorry, I can't help.", " c", "I'm sorry, I can't help.", "I'm sorry, I can't help.")
    gather(bench.teacher(bench.Script([refusing])), bench.continue_query(n=5))
    script = honest(bench)
    (evidence,) = gather(bench.teacher(script), bench.continue_query(n=5))
    assert sorted((body["seed"], body.get("n", 1)) for body in script.bodies) == [(101, 1), (103, 2)]
    assert [reply.text for reply in evidence.replies] == [" a", " thirty-101", " c", " thirty-103", " thirty-104"]


def test_a_server_that_ignores_n_is_asked_for_the_rest(bench: Any) -> None:
    script = bench.Script(lambda body: bench.say(f" thirty-{body['seed']}"))
    teacher = bench.teacher(script)
    (evidence,) = gather(teacher, bench.continue_query(n=5))
    assert [reply.text for reply in evidence.replies] == [f" thirty-{seed}" for seed in range(100, 105)]
    assert script.calls == evidence.usage.calls == 5
    gather(teacher, bench.continue_query(n=5, row=1, seed=200))
    assert ["n" in body for body in script.bodies] == [True] + [False] * 9  # it has learnt


def test_a_server_that_gives_too_many_gives_no_more_than_asked(bench: Any) -> None:
    (evidence,) = gather(bench.teacher(bench.Script([bench.say(*"abcdef")])), bench.continue_query(n=2))
    assert [reply.text for reply in evidence.replies] == ["a", "b"]


def test_l20_without_n_one_call_warms_the_cache(bench: Any) -> None:
    script = honest(bench)
    (evidence,) = gather(bench.teacher(script, n=False), bench.continue_query(n=4))
    assert script.calls == 4
    assert not any("n" in body for body in script.bodies)
    assert script.bodies[0]["seed"] == 100
    assert len({reply.text for reply in evidence.replies}) == 4


def test_l20_chunks_of_a_rollout_are_sent_in_ascending_order(bench: Any) -> None:
    script = honest(bench)
    starts = [30, 5, 80, 0, 55]
    queries = [
        bench.continue_query(prefix=bench.PREFIX + " x" * start, row=row, start=start, seed=1000 * row + start)
        for start in starts
        for row in (1, 0)
    ]
    found = gather(bench.teacher(script), *queries)
    assert [evidence.query for evidence in found] == queries
    for row in (0, 1):
        sent = [body["seed"] % 1000 for body in script.bodies if body["seed"] // 1000 == row]
        assert sent == sorted(starts)


def test_the_audited_text_never_reaches_the_teacher(bench: Any) -> None:
    for settings in ({"continuation": "prefill"}, {"continuation": "instruct"}, {"prefill_style": "prefix"}):
        script = honest(bench)
        gather(bench.teacher(script, **settings), bench.continue_query(), bench.continue_query(prefix="", row=1))
        assert script.calls >= 2
        assert "AUDITED" not in json.dumps(script.bodies)


@pytest.mark.parametrize("rung", ["prefill", "instruct", "auto"])
def test_r15_every_request_states_temperature_top_p_and_the_limit(bench: Any, rung: str) -> None:
    script = honest(bench)
    teacher = bench.teacher(script, continuation=rung)
    gather(teacher, bench.continue_query(), bench.continue_query(prefix="", row=1), bench.answer_query(row=2))
    for body in script.bodies:
        assert (body["temperature"], body["top_p"]) in [(1.0, 1.0), (0.0, 1.0)]  # a look asks for the likeliest
        assert body["max_tokens"] >= 16
        assert body["model"] == "scripted"


def test_forms_of_an_open_turn(bench: Any) -> None:
    def sent(**settings: Any) -> dict[str, Any]:
        script = honest(bench)
        gather(bench.teacher(script, fingerprint=str(settings), **settings), bench.continue_query(n=1))
        return script.bodies[0]

    vllm = sent()
    assert (vllm["add_generation_prompt"], vllm["continue_final_message"]) == (False, True)
    assert vllm["messages"][-1] == {"role": "assistant", "content": bench.PREFIX}
    assert sent(prefill_style="prefix")["messages"][-1]["prefix"] is True
    assert sent(prefill_style="partial")["messages"][-1]["partial"] is True
    plain = sent(prefill_style="plain", seed=False, max_tokens_field="max_completion_tokens", extra_body={"top_k": -1})
    assert plain["messages"][-1] == {"role": "assistant", "content": bench.PREFIX}
    assert "seed" not in plain
    assert plain["max_completion_tokens"] == 16
    assert "max_tokens" not in plain
    assert plain["top_k"] == -1
    instruct = sent(continuation="instruct", system="Be exact.")
    assert [message["role"] for message in instruct["messages"]] == ["system", "user"]
    assert instruct["max_tokens"] == 16 + ladder.ECHO_TOKENS
    assert "continue_final_message" not in instruct


def test_one_system_message(bench: Any) -> None:
    script = honest(bench)
    prompt = Prompt("p", (Message("system", "Be brief."), Message("user", "Hi")))
    gather(bench.teacher(script, system="Be exact."), replace(bench.answer_query(), prompt=prompt))
    assert script.bodies[0]["messages"][0] == {"role": "system", "content": "Be exact.\n\nBe brief."}
    assert len(script.bodies[0]["messages"]) == 2


def test_l15_white_space_of_a_reply_is_kept(bench: Any) -> None:
    echo = ladder.echo_of(bench.PREFIX)
    (prefill,) = gather(bench.teacher(bench.Script([bench.say("\n  thirty \n")])), bench.continue_query(n=1))
    script = bench.Script([bench.say(f"{echo}\n  thirty \n", " no echo", f"<think>hm</think>{echo} 30")])
    (instruct,) = gather(bench.teacher(script, continuation="instruct"), bench.continue_query(n=3))
    assert prefill.replies == (Reply("\n  thirty \n", "stop"),)
    assert instruct.replies == (Reply("\n  thirty \n", "stop"), Reply(" 30", "stop"))
    assert instruct.rejected == {"no_echo": 1}


def test_l12_finish_is_passed_on(bench: Any) -> None:
    said = bench.Said(body={"choices": [bench.choice(" a", "length"), bench.choice(" b", "stop")]})
    (evidence,) = gather(bench.teacher(bench.Script([said])), bench.continue_query(n=2))
    assert [reply.finish for reply in evidence.replies] == ["length", "stop"]


def test_whole_answers_and_continuations_of_nothing(bench: Any) -> None:
    said = bench.Said(body={"choices": [bench.choice("It is 42.", "stop"), bench.choice("It is", "length")]})
    script = bench.Script([said])
    query = bench.answer_query(n=2)
    opening = replace(bench.continue_query(prefix="", n=2, row=1, seed=query.seed), max_tokens=query.max_tokens)
    answers, continuations = gather(bench.teacher(script), query, opening)
    assert isinstance(answers, Answers)
    assert (answers.replies, answers.rejected) == ((Reply("It is 42.", "stop"),), {"cut": 1})
    assert len(continuations.replies) == 2
    assert all(body["messages"] == [{"role": "user", "content": "What is 6 times 7?"}] for body in script.bodies)


def test_equal_queries_of_one_step_are_paid_once(bench: Any) -> None:
    script = honest(bench)
    one, two = gather(bench.teacher(script), bench.answer_query(row=0), bench.answer_query(row=1))
    assert script.calls == 1
    assert one.replies == two.replies
    assert one.usage + two.usage == Usage(1, 1, 100, 10)


def test_the_meter(bench: Any) -> None:
    script = bench.Script([bench.say(*"abc", usage=(1000, 31))])
    teacher = bench.teacher(script, price={"prompt": 2.0, "completion": 8.0})
    queries = [bench.continue_query(row=row, n=3, seed=row * 10) for row in range(3)]
    total = sum((evidence.usage for evidence in gather(teacher, *queries)), Usage())
    assert (total.calls, total.prompt_tokens, total.completion_tokens) == (3, 3000, 93)
    assert total.cost_usd == pytest.approx((3000 * 2 + 93 * 8) / 1e6)
    keys = [key for query in queries for key in teacher.manner.ask(query).keys(3)]
    draws = bench.store.get_many(keys).values()
    assert (sum(d.prompt_tokens for d in draws), sum(d.completion_tokens for d in draws)) == (3000, 93)
    assert {draw.model for draw in draws} == {"scripted-1"}


def test_progress_and_empty_gathers(bench: Any) -> None:
    teacher, heard = bench.teacher(honest(bench)), list[tuple[int, int]]()
    assert gather(teacher) == []
    asked = [*(bench.continue_query(row=row, seed=row) for row in range(3)), bench.continue_query(n=0)]
    found = asyncio.run(teacher.gather(asked, lambda *done: heard.append(done)))
    assert heard == [(done, 4) for done in (1, 2, 3, 4)]
    assert found[3].replies == ()


def test_s10_a_cancelled_gather_keeps_what_arrived_and_what_was_under_way(bench: Any) -> None:
    slow = bench.say(" late")
    slow.delay_s = 1.5
    script = bench.Script(lambda body: slow if body["seed"] >= 300 else bench.say(*"abcd"))
    queries = [bench.continue_query(start=start, seed=100 * start) for start in (1, 2, 3)]

    async def cancelled(teacher: Any) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.7):
                await teacher.gather(queries)

    with bench.serving(script) as url:
        asyncio.run(cancelled(bench.teacher(base_url=url)))
    assert bench.store.stats().answers == 9  # a call under way is paid for


def test_a_store_that_fails_ends_the_gather(bench: Any) -> None:
    teacher = bench.teacher(honest(bench))
    gather(teacher, bench.continue_query())
    bench.store.close()
    with pytest.raises(StoreError, match=r"answers\.sqlite"):
        gather(teacher, bench.continue_query(seed=5))


def test_auto_takes_prefill_where_the_turn_goes_on(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    script = bench.Script([bench.say(" 5, 6", usage=(20, 3)), bench.say(*"abcd")])
    teacher = bench.teacher(script, continuation="auto")
    assert teacher.capabilities.continuation == "instruct"
    (evidence,) = gather(teacher, bench.continue_query())
    assert teacher.capabilities.continuation == "prefill"
    assert script.bodies[0]["messages"][-1] == {"role": "assistant", "content": "1, 2, 3, 4,"}
    assert evidence.usage == Usage(2, 0, 120, 13)
    assert "continuation prefill: goes on" in caplog.text
    again = bench.teacher(script, continuation="auto")
    gather(again, bench.continue_query(seed=9))
    assert again.capabilities.continuation == "prefill"
    assert script.calls == 3  # the store remembered


@pytest.mark.parametrize("start", ["1, 2, 3", "Sure! 5", ""])
def test_auto_falls_to_instruct_where_the_turn_starts_over(bench: Any, start: str) -> None:
    script = bench.Script([bench.say(start), bench.say(*(ladder.echo_of(bench.PREFIX) + c for c in "abcd"))])
    teacher = bench.teacher(script, continuation="auto")
    (evidence,) = gather(teacher, bench.continue_query())
    assert teacher.capabilities.continuation == "instruct"
    assert len(evidence.replies) == 4


def test_auto_falls_to_instruct_where_the_open_turn_is_refused(bench: Any) -> None:
    refused = bench.Said(400, {"error": {"message": "The conversation must end with a user message"}})
    script = bench.Script([refused, bench.say(*(ladder.echo_of(bench.PREFIX) + c for c in "abcd"))])
    (evidence,) = gather(bench.teacher(script, continuation="auto"), bench.continue_query())
    assert len(evidence.replies) == 4


def test_auto_asks_nothing_where_no_prefix_is_asked_about(bench: Any) -> None:
    script = bench.Script([bench.say("42", "6*7=42")])
    gather(bench.teacher(script, continuation="auto"), bench.answer_query())
    assert script.calls == 1


def test_s7_the_fingerprint_follows_what_changes_an_answer(bench: Any) -> None:
    def mark(**settings: Any) -> str:
        return bench.teacher(**settings).fingerprint

    base = mark()
    different = [
        {"model": "other"},
        {"base_url": "https://api.example.com/v1"},
        {"base_url": "http://127.0.0.1:9/v2"},
        {"continuation": "instruct"},
        {"prefill_style": "plain"},
        {"system": "x"},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"extra_body": {"top_k": -1}},
        {"fingerprint": "weights-7"},
    ]
    assert len({base, *(mark(**one) for one in different)}) == len(different) + 1
    same = [{"base_url": "http://localhost:8123/v1/"}, {"timeout_s": 1}, {"concurrency": 1}, {"max_attempts": 1}]
    assert {base, *(mark(**one) for one in same)} == {base}
    assert mark(base_url="http://gpu:8000/v1") != mark(base_url="http://gpu:8001/v1")
    assert bench.CANARY not in base


def test_settings_that_cannot_be(bench: Any) -> None:
    for settings in ({"temperature": -1}, {"top_p": 0}, {"n": "maybe"}, {"extra_body": {"temperature": 0}}, {"foo": 1}):
        with pytest.raises(ValueError, match="validation error"):
            OpenAIConfig(model="m", **settings)
