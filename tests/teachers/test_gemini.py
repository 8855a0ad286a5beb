"""The generateContent format: what goes over the wire, what a reply is read as, what each error leads to."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from omniopd.errors import TeacherError
from omniopd.types import Message, Prompt, Reply, Token, Usage
from teachers import ladder
from teachers.gemini import GeminiConfig

NO_PREFILL = "Requests ending with a model turn are not supported."
QUESTION = {"role": "user", "parts": [{"text": "What is 6 times 7?"}]}
SAMPLING = {"temperature": 1.0, "topP": 1.0}


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def candidate(*parts: Any, finish: Any = "STOP", **more: Any) -> dict[str, Any]:
    """A candidate with these parts; a text stands for a text part."""
    content = {"role": "model", "parts": [{"text": part} if isinstance(part, str) else part for part in parts]}
    return {"content": content, "finishReason": finish, "index": 0, **more}


def say(bench: Any, *candidates: Any, **usage: Any) -> Any:
    """A reply with these candidates; a text stands for a whole one."""
    return bench.Said(
        body={
            "candidates": [candidate(one) if isinstance(one, str) else one for one in candidates],
            "usageMetadata": {"promptTokenCount": 100, "candidatesTokenCount": 10, "totalTokenCount": 110, **usage},
            "modelVersion": "scripted-1",
            "responseId": "r1",
        }
    )


def fault(bench: Any, code: int, status: str, message: str, *details: Any) -> Any:
    return bench.Said(code, {"error": {"code": code, "message": message, "status": status, "details": list(details)}})


def reason(text: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": text, "domain": "googleapis.com"}


def quota(*ids: str) -> dict[str, Any]:
    violations = [{"quotaMetric": "generate_content_requests", "quotaId": one} for one in ids]
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": violations}


def wait(delay: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


def sent(bench: Any, query: Any, **settings: Any) -> dict[str, Any]:
    """The body of the one request for a query."""
    script = bench.Script([say(bench, *["x"] * query.n)])
    gather(bench.make("gemini", script, fingerprint=str(settings), **settings), query)
    (body,) = script.bodies
    return body


# ---------------------------------------------------------------------- requests


def test_plain_prefilled_and_instructed_requests(bench: Any) -> None:
    plain = {
        "contents": [QUESTION],
        "generationConfig": {"maxOutputTokens": 16, **SAMPLING, "candidateCount": 4, "seed": 100},
    }
    assert sent(bench, bench.continue_query(prefix=""), continuation="prefill") == plain
    assert sent(bench, bench.answer_query(n=1), continuation="prefill") == {
        "contents": [QUESTION],
        "generationConfig": {"maxOutputTokens": 64, **SAMPLING, "seed": 7},
    }
    assert sent(bench, bench.continue_query(), continuation="prefill") == plain | {
        "contents": [QUESTION, {"role": "model", "parts": [{"text": bench.PREFIX}]}]
    }
    instruct = sent(
        bench, bench.continue_query(), continuation="instruct", system="Be exact.", temperature=0.5, top_p=None
    )
    assert instruct == {
        "contents": [
            {"role": "user", "parts": [{"text": ladder.render_instruct(bench.prompt(), bench.PREFIX)[0].content}]}
        ],
        "systemInstruction": {"parts": [{"text": "Be exact."}]},
        "generationConfig": {
            "maxOutputTokens": 16 + ladder.ECHO_TOKENS,
            "temperature": 0.5,
            "candidateCount": 4,
            "seed": 100,
        },
    }


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-2.5-flash", "models/gemini-2.5-flash"),
        ("models/gemini-2.5-flash", "models/gemini-2.5-flash"),
        ("mine?key=x#y", "models/mine%3Fkey%3Dx%23y"),
    ],
)
def test_address_and_key(bench: Any, model: str, path: str) -> None:
    script = bench.Script([say(bench, " thirty")])
    gather(bench.make("gemini", script, model=model, continuation="prefill"), bench.continue_query(n=1))
    assert script.urls == [f"https://generativelanguage.googleapis.com/v1beta/{path}:generateContent"]
    (headers,) = script.headers
    assert headers["x-goog-api-key"] == bench.CANARY
    assert "authorization" not in headers
    assert GeminiConfig(model="m").api_key_env == "GEMINI_API_KEY"


def test_settings_of_the_request(bench: Any) -> None:
    def generation(**settings: Any) -> dict[str, Any]:
        return sent(bench, bench.continue_query(n=1), continuation="prefill", **settings)["generationConfig"]

    bare = {"maxOutputTokens": 16, "seed": 100}
    none = {"temperature": None, "top_p": None}
    assert generation(**none) == bare
    assert generation(**none, thinking="off") == bare | {"thinkingConfig": {"thinkingBudget": 0}}
    level = {"thinkingLevel": "minimal"}
    assert generation(**none, thinking="off", thinking_config=level) == bare | {"thinkingConfig": level}
    assert generation(**none, thinking_config=level, system="x") == bare | {"thinkingConfig": level}
    assert generation(**none, logprobs=5) == bare | {"responseLogprobs": True, "logprobs": 5}
    assert generation(**none, thinking_tokens=100) == bare | {"maxOutputTokens": 116}
    assert generation(**none, seed=False) == {"maxOutputTokens": 16}
    extra = {"generationConfig": {"topK": 5}, "safetySettings": []}
    body = sent(bench, bench.continue_query(n=1), continuation="prefill", **none, extra_body=extra)
    assert (body["generationConfig"], body["safetySettings"]) == (bare | {"topK": 5}, [])


def test_roles_and_system_turns(bench: Any) -> None:
    turns = ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")
    chat = Prompt("p", tuple(Message(role, text) for role, text in turns))
    body = sent(bench, replace(bench.continue_query(), prompt=chat), continuation="prefill", system="Be exact.")
    assert body["systemInstruction"] == {"parts": [{"text": "Be exact.\n\nBe brief."}]}
    assert [turn["role"] for turn in body["contents"]] == ["user", "model", "user", "model"]


def test_a_call_asks_for_no_more_candidates_than_the_api_takes(bench: Any) -> None:
    def answer(body: dict[str, Any]) -> Any:
        config = body["generationConfig"]
        return say(bench, *(f" thirty-{config['seed'] + i}" for i in range(config.get("candidateCount", 1))))

    script = bench.Script(answer)
    (evidence,) = gather(bench.make("gemini", script, continuation="prefill"), bench.continue_query(n=10))
    asked = [
        (body["generationConfig"].get("candidateCount"), body["generationConfig"]["seed"]) for body in script.bodies
    ]
    assert asked == [(8, 100), (2, 108)]
    assert [reply.text for reply in evidence.replies] == [f" thirty-{seed}" for seed in range(100, 110)]


def test_seeds_have_31_bits(bench: Any) -> None:
    big = bench.continue_query(n=1, seed=2**31 + 5)
    assert sent(bench, big, continuation="prefill")["generationConfig"]["seed"] == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"extra_body": {"contents": []}}, "must not hold contents"),
        ({"extra_body": {"generationConfig": {"seed": 1, "topP": 1}}}, "must not hold seed, topP"),
        ({"extra_body": {"generationConfig": 7}}, "must hold fields"),
        ({"thinking_config": "low"}, "thinking_config"),
    ],
)
def test_settings_that_the_format_lacks_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as error:
        GeminiConfig(model="m", **settings)
    assert words in str(error.value)


def test_what_changes_an_answer_is_in_the_fingerprint(bench: Any) -> None:
    settings = [
        {},
        {"thinking_config": {"thinkingLevel": "low"}},
        {"thinking": "off"},
        {"temperature": 0.5},
        {"top_p": 0.5},
    ]
    assert len({bench.make("gemini", **one).fingerprint for one in settings}) == len(settings)
    assert bench.CANARY not in json.dumps(bench.make("gemini").backend.record())


# ---------------------------------------------------------------------- replies


def test_parts_are_joined_and_thoughts_are_skipped(bench: Any) -> None:
    said = say(
        bench,
        candidate("\n thirty", " and 12 \n", finish="MAX_TOKENS"),
        candidate({"text": "Let me see", "thought": True}, " 30"),
    )
    teacher = bench.make("gemini", bench.Script([said]), continuation="prefill")
    (evidence,) = gather(teacher, bench.continue_query(n=2))
    assert evidence.replies == (Reply("\n thirty and 12 \n", "length"), Reply(" 30", "stop"))
    draws = bench.store.get_many(teacher.manner.ask(evidence.query).keys(2)).values()
    assert {draw.model for draw in draws} == {"scripted-1"}


@pytest.mark.parametrize(
    ("finish", "rejected", "ended"),
    [
        ("STOP", {}, "stop"),
        ("MAX_TOKENS", {}, "length"),
        ("SAFETY", {"filtered": 1}, ""),
        ("RECITATION", {"filtered": 1}, ""),
        ("PROHIBITED_CONTENT", {"filtered": 1}, ""),
        ("BLOCKLIST", {"filtered": 1}, ""),
        ("SPII", {"filtered": 1}, ""),
        ("LANGUAGE", {"filtered": 1}, ""),
        ("OTHER", {"error": 1}, ""),
        ("MALFORMED_FUNCTION_CALL", {"error": 1}, ""),
        (None, {"error": 1}, ""),
    ],
)
def test_how_a_reply_ends(bench: Any, finish: Any, rejected: dict[str, int], ended: str) -> None:
    script = bench.Script([say(bench, candidate(" thirty", finish=finish))])
    (evidence,) = gather(bench.make("gemini", script, continuation="prefill"), bench.continue_query(n=1))
    assert evidence.rejected == rejected
    assert [reply.finish for reply in evidence.replies] == ([ended] if ended else [])


def test_a_filtered_candidate_has_no_content_and_leaves_the_others(bench: Any) -> None:
    said = say(bench, {"finishReason": "SAFETY", "index": 0, "safetyRatings": []}, " thirty")
    (evidence,) = gather(bench.make("gemini", bench.Script([said]), continuation="prefill"), bench.continue_query(n=2))
    assert (evidence.replies, evidence.rejected) == ((Reply(" thirty", "stop"),), {"filtered": 1})


def test_a_filtered_prompt_is_a_hole_and_is_not_asked_again(bench: Any) -> None:
    blocked = bench.Said(body={"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {}})
    script = bench.Script([blocked])
    (evidence,) = gather(bench.make("gemini", script, continuation="prefill"), bench.continue_query(n=3))
    assert (evidence.replies, evidence.rejected, script.calls) == ((), {"filtered": 3}, 1)
    rated = say(bench, " thirty").body | {"promptFeedback": {"blockReason": "SAFETY", "safetyRatings": []}}
    assert bench.make("gemini").backend.classify(200, rated) is None


def test_hidden_thought_and_silence_have_their_own_reasons(bench: Any) -> None:
    def rejected(said: Any, seed: int) -> Any:
        teacher = bench.make("gemini", bench.Script([said]), continuation="prefill")
        return gather(teacher, bench.continue_query(n=1, seed=seed))[0].rejected

    assert rejected(say(bench, ""), 1) == {"empty": 1}
    thought = candidate({"text": "hm", "thought": True}, finish="MAX_TOKENS")
    assert rejected(say(bench, thought), 2) == {"only_reasoning": 1}
    silent = {"content": {"role": "model"}, "finishReason": "MAX_TOKENS"}
    assert rejected(say(bench, silent, thoughtsTokenCount=16, candidatesTokenCount=0), 3) == {"only_reasoning": 1}


@pytest.mark.parametrize(
    ("counts", "output"),
    [
        ({"candidatesTokenCount": 10, "thoughtsTokenCount": 30, "totalTokenCount": 2540}, 40),  # on top
        ({"candidatesTokenCount": 40, "thoughtsTokenCount": 30, "totalTokenCount": 2540}, 40),  # counted in
        ({"candidatesTokenCount": 10, "thoughtsTokenCount": 30, "totalTokenCount": 0}, 40),
    ],
)
def test_usage_counts_all_input_and_thoughts_as_output(bench: Any, counts: dict[str, int], output: int) -> None:
    said = say(bench, " thirty", promptTokenCount=2500, cachedContentTokenCount=2000, **counts)
    price = {"prompt": 4.0, "completion": 20.0, "cache_read": 0.4}
    teacher = bench.make("gemini", bench.Script([said]), continuation="prefill", price=price)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    cost = (500 * 4.0 + 2000 * 0.4 + output * 20.0) / 1e6
    assert evidence.usage == Usage(1, 0, 2500, output, pytest.approx(cost), 2000, 0, 30)


def test_usage_of_servers_that_tell_little_or_none(bench: Any) -> None:
    teacher = bench.make("gemini")
    ask = teacher.manner.ask(bench.continue_query())
    little = {"candidates": [candidate("x")], "usageMetadata": {"promptTokenCount": 35, "candidatesTokenCount": 13}}
    assert teacher.backend.read(little, ask).usage == Usage(prompt_tokens=35, completion_tokens=13)
    assert teacher.backend.read({"candidates": [candidate("x")]}, ask).usage is None


def spelt(*tokens: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"token": text, "tokenId": 1, "logProbability": logprob} for text, logprob in tokens]


def test_logprobs_of_what_was_written(bench: Any) -> None:
    result = {
        "chosenCandidates": spelt((" thir", -0.5), ("ty", 0.0), ("<end>", -0.1)),
        "topCandidates": [
            {"candidates": spelt((" thir", -0.5), (" twen", -1.5))},
            {"candidates": [*spelt(("ty", 0.0)), {"token": "teen"}]},
            {"candidates": spelt(("<end>", -0.1))},
        ],
    }
    script = bench.Script([say(bench, candidate(" thirty", logprobsResult=result))])
    teacher = bench.make("gemini", script, continuation="prefill", logprobs=2)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    tokens = (Token(" thir", -0.5, ((" thir", -0.5), (" twen", -1.5))), Token("ty", 0.0, (("ty", 0.0),)))
    assert evidence.replies == (Reply(" thirty", "stop", tokens),)
    unasked = bench.make("gemini", script, continuation="prefill")
    assert gather(unasked, bench.continue_query(n=1))[0].replies == (Reply(" thirty", "stop"),)


@pytest.mark.parametrize(
    "result",
    [
        None,
        {},
        {"chosenCandidates": spelt((" for", -0.5), ("ty", -0.1))},  # another text, such as a thought
        {"chosenCandidates": [*spelt((" thir", -0.5)), {"token": "ty"}]},  # no log-prob is not a log-prob of 0
    ],
)
def test_logprobs_that_do_not_belong_to_the_text_are_none(bench: Any, result: Any) -> None:
    script = bench.Script([say(bench, candidate(" thirty", logprobsResult=result))])
    (evidence,) = gather(bench.make("gemini", script, continuation="prefill", logprobs=2), bench.continue_query(n=1))
    assert evidence.replies == (Reply(" thirty", "stop"),)


@pytest.mark.parametrize(
    "body",
    [
        {"candidates": []},
        {"usageMetadata": {"promptTokenCount": 1}},
        {"candidates": ["thirty"]},
        {"candidates": [{"content": {"parts": "thirty"}, "finishReason": "STOP"}]},
        {"candidates": [{"content": {"parts": ["thirty"]}, "finishReason": "STOP"}]},
        {"candidates": [candidate(" thirty", logprobsResult={"chosenCandidates": 7})]},
        {"candidates": [candidate(" thirty", logprobsResult={"chosenCandidates": ["a"], "topCandidates": []})]},
        [1],
        None,
    ],
)
def test_a_malformed_reply_is_asked_for_again(bench: Any, body: Any) -> None:
    script = bench.Script([bench.Said(body=body), say(bench, " thirty")])
    teacher = bench.make("gemini", script, continuation="prefill", logprobs=1)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert (len(evidence.replies), evidence.usage.calls) == (1, 2)


# ---------------------------------------------------------------------- errors

BAD, FULL = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"
MONEY, LONG, KEY, DAY = "no money left", "context_overflow", "OMNI_TEST_KEY", "quota of this day"
PER_DAY = quota("GenerateRequestsPerMinutePerProjectPerModel", "GenerateRequestsPerDayPerProjectPerModel-FreeTier")


@pytest.mark.parametrize(
    ("code", "status", "message", "details", "action", "which"),
    [
        (500, "INTERNAL", "An internal error has occurred.", [], "retry", "error"),
        (503, "UNAVAILABLE", "The model is overloaded.", [], "retry", "error"),
        (504, "DEADLINE_EXCEEDED", "Deadline expired.", [], "retry", "error"),
        (499, "CANCELLED", "The operation was cancelled.", [], "retry", "error"),
        (429, FULL, "Resource has been exhausted (e.g. check quota).", [], "throttle", "error"),
        (503, FULL, "Resource has been exhausted", [], "throttle", "error"),
        (429, FULL, "You exceeded your current quota", [quota("GenerateRequestsPerMinute"), wait("7s")], "throttle", "error"),
        (429, FULL, "You exceeded your current quota", [PER_DAY, wait("7s")], "stop", DAY),
        (429, FULL, "Your prepayment credits are depleted.", [], "stop", MONEY),
        (429, FULL, "Your project has exceeded its monthly spending cap.", [], "stop", MONEY),
        (402, BAD, "Payment required", [], "stop", MONEY),
        (400, BAD, "API key not valid. Please pass a valid API key.", [reason("API_KEY_INVALID")], "ask", KEY),
        (401, "UNAUTHENTICATED", "Request had invalid authentication credentials.", [], "ask", KEY),
        (403, "PERMISSION_DENIED", "Your API key was reported as leaked.", [], "ask", KEY),
        (404, "NOT_FOUND", "models/scripted is not found for API version v1beta", [], "ask", "teacher.model"),
        (400, "FAILED_PRECONDITION", "User location is not supported for the API use.", [], "ask", "region"),
        (400, BAD, "maxOutputTokens value of 99999 but the supported range is from 1 to 65537", [], "ask", "thinking_tokens"),
        (405, "", "Method Not Allowed", [], "ask", "teacher.base_url"),
        (400, BAD, "The input token count (9) exceeds the maximum number of tokens allowed (8).", [], "drop", LONG),
        (400, BAD, "contents.parts must not be empty.", [], "drop", "error"),
        (400, BAD, "* GenerateContentRequest.contents: contents is not specified", [], "drop", "error"),
        (400, BAD, NO_PREFILL, [], "downgrade", "prefill"),
        (400, BAD, "Please ensure that multiturn requests ends with a user role", [], "downgrade", "prefill"),
        (400, BAD, "Multiple candidates is not enabled for this model", [], "downgrade", "n"),
        (400, BAD, "candidateCount must be 1 but the entered value was 3.", [], "downgrade", "n"),
        (400, BAD, 'Unknown name "seed" at \'generation_config\': Cannot find field.', [], "downgrade", "seed"),
        (400, BAD, "temperature is not supported by this model", [], "downgrade", "temperature"),
        (400, BAD, "Unable to submit request because topP must be 1", [], "downgrade", "top_p"),
        (400, BAD, "Logprobs is not enabled for models/gemini-2.5-pro", [], "downgrade", "logprobs"),
        (400, BAD, "Unknown name 'responseLogprobs'", [], "downgrade", "logprobs"),
        (400, BAD, "Budget 0 is invalid. This model only works in thinking mode.", [], "downgrade", "thinking"),
        (400, BAD, "Developer instruction is not enabled for models/gemma-3-1b-it", [], "downgrade", "system"),
        (400, BAD, "Request contains an invalid argument.", [], "downgrade", ""),
    ],
)  # fmt: skip
def test_errors(bench: Any, code: int, status: str, message: str, details: Any, action: str, which: str) -> None:
    said = fault(bench, code, status, message, *details)
    backend = bench.make("gemini").backend
    verdict = backend.classify(code, said.body)
    assert verdict.action == action
    assert "https://generativelanguage.googleapis.com/v1beta" in verdict.message
    if action in ("drop", "retry", "throttle"):
        assert verdict.reason == which
        assert verdict.wait_s == (7.0 if details else 0.0)
    elif action == "downgrade":
        assert verdict.param == which
        mends = {"prefill": "continuation: instruct", "system": "system", "thinking": "thinking_config", "": "teacher"}
        assert mends.get(which, f"teacher.{which}") in verdict.message
    else:
        assert which in verdict.message
    assert backend.classify(code, [said.body]) == verdict  # some come in a list


@pytest.mark.parametrize(
    ("code", "error", "action"),
    [
        (400, {"message": "No connected db.", "type": "no_db_connection", "param": None, "code": "400"}, "ask"),
        (400, {"message": "Invalid model name passed in model=nope.", "type": "invalid_request_error"}, "ask"),
        (400, {"message": "litellm.ContextWindowExceededError: litellm.BadRequestError: ..."}, "drop"),
        (500, {"message": "litellm.APIConnectionError: x - litellm.BadRequestError: y - bad temperature"}, "downgrade"),
        (500, {"message": "litellm.APIConnectionError: connection refused"}, "retry"),
        (429, {"details": [{"violations": "PerDay"}, {"violations": [7, {"quotaId": 7}]}, 7]}, "throttle"),
        (429, {"details": {"retryDelay": 7}}, "throttle"),
        (400, "?", "downgrade"),
    ],
)
def test_errors_of_proxies_and_in_odd_shapes(bench: Any, code: int, error: Any, action: str) -> None:
    assert bench.make("gemini").backend.classify(code, {"error": error}).action == action


@pytest.mark.parametrize(
    ("delay", "waited"), [("7s", 7.0), ("11.665902715s", 11.665902715), ("soon", 0.0), ("-3s", 0.0)]
)
def test_the_wait_that_the_body_asks_for(bench: Any, delay: str, waited: float) -> None:
    verdict = bench.make("gemini").backend.classify(429, fault(bench, 429, FULL, "quota", wait(delay)).body)
    assert verdict.wait_s == waited


def test_a_throttled_call_waits_as_asked(bench: Any) -> None:
    script = bench.Script([fault(bench, 503, FULL, "quota", wait("7s")), say(bench, " thirty")])
    (evidence,) = gather(bench.make("gemini", script, continuation="prefill"), bench.continue_query(n=1))
    assert (len(evidence.replies), evidence.usage.calls) == (1, 2)
    assert bench.waits == [7.0]


def test_the_end_of_a_daily_quota_ends_the_step(bench: Any) -> None:
    script = bench.Script([fault(bench, 429, FULL, "quota", PER_DAY, wait("7s"))])
    with pytest.raises(TeacherError, match="resume tomorrow"):
        gather(bench.make("gemini", script, continuation="prefill"), bench.continue_query())
    assert script.calls == 1


@pytest.mark.parametrize(
    ("refused", "message"),
    [("candidateCount", "Multiple candidates is not enabled for this model"), ("seed", 'Unknown name "seed"')],
)
def test_what_is_refused_is_left_out_where_the_config_allows(bench: Any, refused: str, message: str) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if refused in body["generationConfig"]:
            return fault(bench, 400, BAD, message)
        return say(bench, *[" thirty"] * body["generationConfig"].get("candidateCount", 1))

    script = bench.Script(answer)
    (evidence,) = gather(bench.make("gemini", script, continuation="prefill"), bench.continue_query(n=3))
    assert len(evidence.replies) == 3
    assert [refused in body["generationConfig"] for body in script.bodies].count(True) == 1
    settings = {"n": True} if refused == "candidateCount" else {"seed": True}
    with pytest.raises(TeacherError, match=f"set teacher.{next(iter(settings))}: false"):
        gather(bench.make("gemini", script, continuation="prefill", **settings), bench.continue_query(seed=999))


# ---------------------------------------------------------------------- the ladder


def later(bench: Any) -> Any:
    """A model that refuses an open model turn and echoes what it is told to."""

    def answer(body: dict[str, Any]) -> Any:
        if body["contents"][-1]["role"] == "model":
            return fault(bench, 400, BAD, NO_PREFILL)
        count = body["generationConfig"].get("candidateCount", 1)
        return say(bench, *[f"{ladder.echo_of(bench.PREFIX)} thirty."] * count)

    return bench.Script(answer)


def test_auto_falls_to_instruct_where_prefill_is_refused(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    script = later(bench)
    teacher = bench.make("gemini", script)
    (evidence,) = gather(teacher, bench.continue_query(n=2))
    assert evidence.replies == (Reply(" thirty.", "stop"),) * 2
    assert teacher.capabilities.continuation == "instruct"
    assert [body["contents"][-1]["role"] for body in script.bodies] == ["model", "user"]
    assert NO_PREFILL in caplog.text


def test_prefill_by_name_is_refused_in_one_line(bench: Any) -> None:
    script = later(bench)
    with pytest.raises(TeacherError) as error:
        gather(bench.make("gemini", script, continuation="prefill"), bench.continue_query())
    assert "set teacher.continuation: instruct" in str(error.value)
    assert "\n" not in str(error.value)
    assert bench.CANARY not in str(error.value)
    assert script.calls == 1


def test_auto_takes_prefill_where_the_turn_goes_on(bench: Any) -> None:
    script = bench.Script([say(bench, " 5, 6"), say(bench, " thirty")])
    teacher = bench.make("gemini", script)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert teacher.capabilities.continuation == "prefill"
    assert evidence.replies == (Reply(" thirty", "stop"),)
    assert script.bodies[0]["contents"][-1] == {"role": "model", "parts": [{"text": "1, 2, 3, 4,"}]}
