"""OpenAI's format: each provider's request, the shapes of usage and log-probs, and what each error leads to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tiny

from omniopd.errors import ConfigError, TeacherError
from omniopd.types import Reply, Token, Usage
from teachers.formats import read_usage
from teachers.openai import OpenAIConfig
from teachers.presets import PRESETS

QUESTION = {"role": "user", "content": "What is 6 times 7?"}
SAMPLING = {"temperature": 1.0, "top_p": 1.0}


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def sent(bench: Any, query: Any, **settings: Any) -> tuple[str, dict[str, Any]]:
    """Address and body of the one request for a query."""
    script = bench.Script([bench.say("x")])
    gather(bench.make("openai", script, fingerprint=str(settings), **settings), query)
    (body,) = script.bodies
    return script.urls[0], body


# ---------------------------------------------------------------------- requests

VLLM = {"add_generation_prompt": False, "continue_final_message": True}
OPENAI = {"max_completion_tokens": 16, "seed": 100}
PLAIN = {"max_tokens": 16, "seed": 100}
ADDRESSES = {
    "generic": ("http://127.0.0.1:9/v1", "OPENAI_API_KEY"),
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "together": ("https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    "fireworks": ("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    "deepseek": ("https://api.deepseek.com/beta", "DEEPSEEK_API_KEY"),
    "mistral": ("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "kimi": ("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY"),
}


def chosen(preset: str) -> dict[str, str]:
    """The settings that choose a preset: a server of one's own is named by its address."""
    return {"base_url": ADDRESSES["generic"][0]} if preset == "generic" else {"preset": preset}


def test_every_preset_is_tested_here() -> None:
    assert ADDRESSES.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", ADDRESSES)
def test_address_and_key_of_each_preset(bench: Any, preset: str) -> None:
    url, key = ADDRESSES[preset]
    assert (
        sent(bench, bench.continue_query(n=1), continuation="instruct", **chosen(preset))[0]
        == f"{url}/chat/completions"
    )
    assert OpenAIConfig(model="m", **chosen(preset)).api_key_env == key


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("generic", PLAIN),
        ("openai", OPENAI),
        ("openrouter", PLAIN),
        ("together", PLAIN),
        ("fireworks", PLAIN),
        ("deepseek", {"max_tokens": 16}),
        ("mistral", {"max_tokens": 16, "random_seed": 100}),
        ("kimi", {"max_tokens": 16}),
    ],
)
def test_a_plain_question_of_each_preset(bench: Any, preset: str, fields: dict[str, Any]) -> None:
    _, body = sent(bench, bench.continue_query(prefix="", n=1), continuation="instruct", **chosen(preset))
    assert body == {"model": "scripted", "messages": [QUESTION], **SAMPLING, **fields}


@pytest.mark.parametrize(
    ("preset", "mark", "fields"),
    [
        ("generic", {}, PLAIN | VLLM),
        ("openrouter", {}, PLAIN),
        ("deepseek", {"prefix": True}, {"max_tokens": 16}),
        ("mistral", {"prefix": True}, {"max_tokens": 16, "random_seed": 100}),
        ("kimi", {"partial": True}, {"max_tokens": 16}),
    ],
)
def test_an_open_turn_of_each_preset(bench: Any, preset: str, mark: dict[str, Any], fields: dict[str, Any]) -> None:
    _, body = sent(bench, bench.continue_query(n=1), continuation="prefill", **chosen(preset))
    turns = [QUESTION, {"role": "assistant", "content": bench.PREFIX, **mark}]
    assert body == {"model": "scripted", "messages": turns, **SAMPLING, **fields}


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("generic", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("openai", {"reasoning_effort": "none"}),
        ("openrouter", {"reasoning": {"enabled": False}}),
        ("together", {}),
        ("fireworks", {}),
        ("deepseek", {"thinking": {"type": "disabled"}}),
        ("mistral", {}),
        ("kimi", {"thinking": {"type": "disabled"}}),
    ],
)
def test_thinking_off_of_each_preset(bench: Any, preset: str, fields: dict[str, Any]) -> None:
    query = bench.continue_query(n=1)
    _, usual = sent(bench, query, continuation="instruct", **chosen(preset))
    _, off = sent(bench, query, continuation="instruct", thinking="off", **chosen(preset))
    assert off == usual | fields


@pytest.mark.parametrize(("preset", "n"), [("openai", 4), ("kimi", 4), ("deepseek", None)])
def test_how_many_texts_a_call_asks_for(bench: Any, preset: str, n: int | None) -> None:
    script = bench.Script(lambda body: bench.say(*["x"] * body.get("n", 1)))
    gather(bench.make("openai", script, preset=preset, continuation="instruct"), bench.continue_query(prefix="", n=4))
    assert [body.get("n") for body in script.bodies] == ([n] if n else [None] * 4)


@pytest.mark.parametrize("preset", ["openai", "together", "fireworks"])
def test_no_prefill_where_the_format_has_none(bench: Any, preset: str) -> None:
    assert bench.make("openai", preset=preset).backend.rungs == ("instruct",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with a chat template."""
    path: Path = tmp_path_factory.mktemp("teacher")
    tiny.byte_level().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("preset", ["together", "fireworks"])
def test_the_completion_route_gets_the_rendered_text(bench: Any, folder: str, preset: str) -> None:
    said = bench.Said(body={"choices": [{"text": " thirty", "finish_reason": "length"}]})
    script = bench.Script([said])
    teacher = bench.make("openai", script, preset=preset, continuation="raw", tokenizer=folder, logprobs=3)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert script.urls == [f"{ADDRESSES[preset][0]}/completions"]
    assert script.bodies == [
        {
            "model": "scripted",
            "prompt": f"<|user|>{QUESTION['content']}<|assistant|>{bench.PREFIX}",
            **SAMPLING,
            **PLAIN,
            "logprobs": 3,
        }
    ]
    assert evidence.replies == (Reply(" thirty", "length"),)


def test_the_completion_route_needs_a_tokenizer_and_a_provider_that_has_it(bench: Any, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.continuation: raw .*teacher\.tokenizer"):
        bench.make("openai", preset="together", continuation="raw")
    with pytest.raises(ConfigError, match=r"teacher\.continuation: raw .*choose prefill, instruct or auto"):
        bench.make("openai", preset="openai", continuation="raw", tokenizer=folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "opnai"}, "preset"),
        ({"preset": ["openai"]}, "preset"),
        ({"preset": "generic"}, "base_url"),
        ({"extra_body": {"logprobs": True, "n": 2}}, "must not hold logprobs, n"),
        ({"seed_field": ""}, "seed_field"),
    ],
)
def test_settings_that_are_wrong_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as error:
        OpenAIConfig(model="m", **settings)
    assert words in str(error.value)


# ---------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 100, "completion_tokens": 10}, Usage(0, 0, 100, 10)),
        (
            {
                "prompt_tokens": 2006,
                "completion_tokens": 300,
                "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 256, "audio_tokens": None},
            },
            Usage(0, 0, 2006, 300, 0.0, 1920, 0, 256),
        ),
        (
            {"prompt_tokens": 2006, "completion_tokens": 3, "prompt_tokens_details": {"cache_write_tokens": 1024}},
            Usage(0, 0, 2006, 3, 0.0, 0, 1024),
        ),
        (  # DeepSeek
            {
                "prompt_tokens": 500,
                "completion_tokens": 3,
                "prompt_cache_hit_tokens": 448,
                "prompt_cache_miss_tokens": 52,
            },
            Usage(0, 0, 500, 3, 0.0, 448),
        ),
        (  # vLLM
            {"prompt_tokens": 35, "completion_tokens": 13, "prompt_tokens_details": None, "total_tokens": 48},
            Usage(0, 0, 35, 13),
        ),
        ({"prompt_tokens": 5, "completion_tokens": None, "completion_tokens_details": 7}, Usage(0, 0, 5)),
        ({"prompt_tokens": 5, "completion_tokens": -1}, Usage(0, 0, 5)),
        ({"prompt_tokens": None}, None),
        ({}, None),
        (None, None),
        ("much", None),
    ],
)
def test_usage_of_each_provider(usage: Any, read: Usage | None) -> None:
    assert read_usage(usage) == read


# ---------------------------------------------------------------------- replies

TOKENS = (
    Token(" thir", -0.5, ((" thir", -0.5), (" twen", -1.5))),
    Token("ty", -0.25, (("ty", -0.25), ("teen", -2.0))),
)
CHAT = {
    "content": [
        {
            "token": token.text,
            "logprob": token.logprob,
            "top_logprobs": [{"token": t, "logprob": p} for t, p in token.top],
        }
        for token in TOKENS
    ]
}
COMPLETION = {
    "tokens": [token.text for token in TOKENS],
    "token_logprobs": [token.logprob for token in TOKENS],
    "top_logprobs": [dict(token.top) for token in TOKENS],
    "text_offset": [0, 5],
}


def test_logprobs_of_the_chat_route(bench: Any) -> None:
    said = bench.Said(body={"choices": [bench.choice(" thirty") | {"logprobs": CHAT}]})
    script = bench.Script([said])
    (evidence,) = gather(bench.teacher(script, logprobs=2), bench.continue_query(n=1))
    assert evidence.replies == (Reply(" thirty", "stop", TOKENS),)
    assert (script.bodies[0]["logprobs"], script.bodies[0]["top_logprobs"]) == (True, 2)
    (unasked,) = gather(bench.teacher(script), bench.continue_query(n=1))
    assert unasked.replies == (Reply(" thirty", "stop"),)
    assert not {"logprobs", "top_logprobs"} & script.bodies[1].keys()


def test_logprobs_of_the_completion_route(bench: Any, folder: str) -> None:
    said = bench.Said(body={"choices": [{"text": " thirty", "finish_reason": "stop", "logprobs": COMPLETION}]})
    teacher = bench.teacher(bench.Script([said]), continuation="raw", tokenizer=folder, logprobs=2)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert evidence.replies == (Reply(" thirty", "stop", TOKENS),)
    bare = {**COMPLETION, "top_logprobs": None}
    said = bench.Said(body={"choices": [{"text": " thirty", "finish_reason": "stop", "logprobs": bare}]})
    teacher = bench.teacher(bench.Script([said]), continuation="raw", tokenizer=folder, logprobs=1)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert evidence.replies[0].tokens == tuple(Token(token.text, token.logprob) for token in TOKENS)


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}])
def test_a_server_that_gives_no_logprobs_gives_its_text(bench: Any, logprobs: Any) -> None:
    said = bench.Said(body={"choices": [bench.choice(" thirty") | {"logprobs": logprobs}]})
    (evidence,) = gather(bench.teacher(bench.Script([said]), logprobs=2), bench.continue_query(n=1))
    assert evidence.replies == (Reply(" thirty", "stop"),)


@pytest.mark.parametrize(
    ("raw", "logprobs"),
    [
        (False, {"content": [{"token": " thirty"}]}),
        (False, {"content": [{"token": " thirty", "logprob": None}]}),
        (False, {"content": ["thirty"]}),
        (True, {"tokens": [" thir", "ty"], "token_logprobs": [-0.5]}),
        (True, {"tokens": [" thirty"], "token_logprobs": [None]}),
    ],
)
def test_logprobs_in_another_shape_are_asked_for_again(bench: Any, folder: str, raw: bool, logprobs: Any) -> None:
    choice = {"text": " thirty", **bench.choice(" thirty")}
    script = bench.Script([bench.Said(body={"choices": [choice | {"logprobs": one}]}) for one in (logprobs, None)])
    settings = {"continuation": "raw", "tokenizer": folder} if raw else {}
    (evidence,) = gather(bench.teacher(script, logprobs=1, **settings), bench.continue_query(n=1))
    assert (len(evidence.replies), evidence.usage.calls) == (1, 2)


def test_a_list_of_parts_is_read_as_its_text(bench: Any) -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": " thir"}, {"type": "text", "text": "ty"}]
    teacher = bench.make("openai", bench.Script([bench.say(parts)]), preset="mistral", continuation="prefill")
    assert gather(teacher, bench.continue_query(n=1))[0].replies == (Reply(" thirty", "stop"),)


@pytest.mark.parametrize(("preset", "replies"), [("mistral", (Reply(" thirty", "stop"),)), ("kimi", ())])
def test_who_says_the_prefix_again(bench: Any, preset: str, replies: Any) -> None:
    script = bench.Script([bench.say(f"{bench.PREFIX} thirty")])
    (evidence,) = gather(bench.make("openai", script, preset=preset, continuation="prefill"), bench.continue_query(n=1))
    assert evidence.replies == replies
    assert evidence.rejected == ({} if replies else {"restart": 1})


@pytest.mark.parametrize(
    ("finish", "ended"),
    [("stop", "stop"), ("eos", "stop"), ("length", "length"), ("max_tokens", "length"), ("end_turn", "stop")],
)
def test_how_a_reply_ends(bench: Any, finish: str, ended: str) -> None:
    (evidence,) = gather(bench.teacher(bench.Script([bench.say(" thirty", finish=finish)])), bench.continue_query(n=1))
    assert evidence.replies == (Reply(" thirty", ended),)


# ---------------------------------------------------------------------- errors

MONEY, LONG, KEY, LIMIT = "no money left", "context_overflow", "OMNI_TEST_KEY", "teacher.thinking_tokens"
OVER = "litellm.ContextWindowExceededError: litellm.BadRequestError: Hosted_vllmException"


def say(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("status", "body", "action", "which"),
    [
        # retry
        (500, say("EngineCore encountered an issue", type="InternalServerError", code=500), "retry", "error"),
        (502, None, "retry", "error"),
        (503, say("overloaded"), "retry", "error"),
        (408, say("Request timed out"), "retry", "error"),
        (409, {}, "retry", "error"),
        (425, {}, "retry", "error"),
        (200, say("upstream", code=503), "retry", "error"),
        (200, say("upstream", code="weird"), "retry", "error"),
        (200, {"error": "upstream"}, "retry", "error"),
        # throttle
        (429, say("Rate limit reached", code="rate_limit_exceeded"), "throttle", "error"),
        (429, None, "throttle", "error"),
        (200, say("Rate limited", code=429), "throttle", "error"),
        (402, say("busy", metadata={"limit_source": "openrouter_in_flight_budget"}), "throttle", "error"),
        # stop
        (402, say("Insufficient Balance"), "stop", MONEY),
        (429, say("pay", type="insufficient_quota"), "stop", MONEY),
        (429, say("pay", code="insufficient_quota"), "stop", MONEY),
        (429, say("pay", code="credit_balance_exhausted"), "stop", MONEY),
        (429, say("pay", code="organization_spend_limit_exceeded"), "stop", MONEY),
        (429, say("pay", code="project_spend_limit_exceeded"), "stop", MONEY),
        (429, say("pay", code="organization_usage_limit_exceeded"), "stop", MONEY),
        (400, say("pay", code="billing_hard_limit_reached"), "stop", MONEY),
        (429, say("Your account is suspended", type="exceeded_current_quota_error"), "stop", MONEY),
        (403, say("Key limit exceeded (total limit)"), "stop", MONEY),
        (200, say("Insufficient credits", code=402), "stop", MONEY),
        (403, say("Insufficient balance"), "stop", MONEY),
        # ask
        (401, say("Incorrect API key"), "ask", KEY),
        (401, {"error": "Unauthorized"}, "ask", KEY),
        (403, say("no access to the model"), "ask", KEY),
        (400, say("Incorrect API key", code="invalid_api_key"), "ask", KEY),
        (400, say("No connected db.", type="no_db_connection", code="400"), "ask", KEY),
        (404, say("The model `nope` does not exist.", type="NotFoundError", param="model", code=404), "ask", "teacher.model"),
        (404, {"detail": "Not Found"}, "ask", "teacher.base_url"),
        (404, b"", "ask", "teacher.base_url"),
        (400, say("Invalid model name passed in model=nope. Call `/v1/models`"), "ask", "teacher.model"),
        (400, say("max_tokens=5000 cannot be greater than max_model_len=1024.", param="max_tokens"), "ask", LIMIT),
        (400, say("max_tokens is too large: 9. This model supports at most 4 completion tokens"), "ask", LIMIT),
        (302, None, "ask", "teacher.base_url"),
        (405, {"detail": "Method Not Allowed"}, "ask", "teacher.base_url"),
        # drop
        (400, say("too long", code="context_length_exceeded"), "drop", LONG),
        (400, say("This model's maximum context length is 1024 tokens.", param="input_tokens"), "drop", LONG),
        (422, say("Input is too long"), "drop", LONG),
        (400, say("The prompt does not fit into the context window"), "drop", LONG),
        (400, say("The input (9 tokens) is longer than the model's context length (8 tokens)."), "drop", LONG),
        (400, say(OVER), "drop", LONG),
        (413, None, "drop", LONG),
        (400, say("no", code="content_filter"), "drop", "filtered"),
        (400, say("no", code="content_policy_violation"), "drop", "filtered"),
        (400, say("no", innererror={"code": "ResponsibleAIPolicyViolation"}), "drop", "filtered"),
        (403, say("flagged", code=403, metadata={"reasons": ["x"], "flagged_input": "y"}), "drop", "filtered"),
        # downgrade
        (400, say("Cannot set `add_generation_prompt` to True"), "downgrade", "prefill"),
        (400, say("Expected last role User or Tool for serving but got assistant"), "downgrade", "prefill"),
        (400, say("Unrecognized field 'prefix'"), "downgrade", "prefill"),
        (400, say("Extra inputs are not permitted", param="continue_final_message"), "downgrade", "prefill"),
        (400, say("Assistant response prefill is incompatible with enable_thinking."), "downgrade", "prefill"),
        (400, say("Requested sample logprobs of 21, max allowed: 20", param="logprobs"), "downgrade", "logprobs"),
        (400, say("Unsupported parameter: 'top_logprobs'", param="top_logprobs"), "downgrade", "logprobs"),
        (400, say("Use 'max_completion_tokens' instead.", param="max_tokens"), "downgrade", "max_tokens"),
        (400, say("Unknown field max_completion_tokens"), "downgrade", "max_completion_tokens"),
        (400, say("n must be 1 when using greedy sampling, got 3."), "downgrade", "n"),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "must be 1"}]}, "downgrade", "n"),
        (400, say("bad", param="n"), "downgrade", "n"),
        (400, say("1 validation error", param="body.seed"), "downgrade", "seed"),
        (422, say("Extra inputs are not permitted: random_seed"), "downgrade", "seed"),
        (400, say("Unsupported value: 'temperature' does not support 0", param="temperature"), "downgrade", "temperature"),
        (400, say("top_p is not supported"), "downgrade", "top_p"),
        (400, say("Unsupported parameter: reasoning_effort"), "downgrade", "thinking"),
        (400, say("Unknown field chat_template_kwargs"), "downgrade", "thinking"),
        (400, say("Reasoning is mandatory and cannot be disabled"), "downgrade", "thinking"),
        (400, say("disabling thinking is not supported"), "downgrade", "thinking"),
        (400, say("bad", param="model"), "downgrade", "model"),
        (400, say("The model does not exist"), "downgrade", "model"),
        (400, say("an error"), "downgrade", ""),
        (400, None, "downgrade", ""),
        (422, {"detail": []}, "downgrade", ""),
    ],
)  # fmt: skip
def test_errors(bench: Any, status: int, body: Any, action: str, which: str) -> None:
    verdict = bench.teacher().backend.classify(status, body)
    assert verdict.action == action
    assert "http://127.0.0.1:9/v1" in verdict.message
    if action in ("drop", "retry", "throttle"):
        assert verdict.reason == which
    elif action == "downgrade":
        assert verdict.param == which
        mends = {"prefill": "teacher.continuation: instruct", "": "the settings of the teacher"}
        mends |= dict.fromkeys(("max_tokens", "max_completion_tokens"), "teacher.max_tokens_field")
        assert mends.get(which, f"teacher.{which}") in verdict.message
    else:
        assert which in verdict.message


@pytest.mark.parametrize("body", [None, {}, {"choices": [], "error": None}, {"choices": ["x"], "error": {"code": 502}}])
def test_what_is_no_error(bench: Any, body: Any) -> None:
    assert bench.teacher().backend.classify(200, body) is None


def test_the_words_of_a_server_stay_short(bench: Any) -> None:
    said = bench.Said(400, say("long\nand " * 400))
    with pytest.raises(TeacherError) as error:
        gather(bench.teacher(bench.Script([said])), bench.continue_query(n=1))
    assert len(str(error.value)) < 400
    assert str(error.value).endswith("correct the settings of the teacher")
    assert "\n" not in str(error.value)
