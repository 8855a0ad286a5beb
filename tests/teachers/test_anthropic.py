"""The Messages format: what goes over the wire, what a reply is read as, what each error leads to."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from omniopd.errors import TeacherError
from omniopd.types import Message, Prompt, Reply, Usage
from teachers import ladder
from teachers.anthropic import PIECE, AnthropicConfig, pieces

NO_PREFILL = "This model does not support assistant message prefill. The conversation must end with a user message."
QUESTION = {"role": "user", "content": "What is 6 times 7?"}


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def say(bench: Any, *blocks: Any, stop: Any = "end_turn", **usage: Any) -> Any:
    """A reply with these blocks; a text stands for a text block."""
    content = [{"type": "text", "text": block} if isinstance(block, str) else block for block in blocks]
    return bench.Said(
        body={
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "scripted-1",
            "content": content,
            "stop_reason": stop,
            "usage": {"input_tokens": 100, "output_tokens": 10, **usage},
        }
    )


def fault(bench: Any, status: int, kind: str, message: str, **more: Any) -> Any:
    return bench.Said(status, {"type": "error", "error": {"type": kind, "message": message, **more}})


def sent(bench: Any, query: Any, **settings: Any) -> dict[str, Any]:
    """The body of the one request for a query."""
    script = bench.Script([say(bench, "x")])
    gather(bench.make("anthropic", script, fingerprint=str(settings), **settings), replace(query, n=1))
    (body,) = script.bodies
    return body


# ---------------------------------------------------------------------- requests


def test_plain_prefilled_and_instructed_requests(bench: Any) -> None:
    plain = {"model": "scripted", "max_tokens": 16, "messages": [QUESTION], "temperature": 1.0}
    assert sent(bench, bench.continue_query(prefix=""), continuation="prefill") == plain
    assert sent(bench, bench.answer_query(), continuation="instruct") == plain | {"max_tokens": 64}
    assert sent(bench, bench.continue_query(), continuation="prefill") == plain | {
        "messages": [QUESTION, {"role": "assistant", "content": bench.PREFIX}]
    }
    instruct = sent(
        bench, bench.continue_query(), continuation="instruct", system="Be exact.", temperature=0.5, top_p=0.9
    )
    assert instruct == {
        "model": "scripted",
        "max_tokens": 16 + ladder.ECHO_TOKENS,
        "system": "Be exact.",
        "messages": [{"role": "user", "content": ladder.render_instruct(bench.prompt(), bench.PREFIX)[0].content}],
        "temperature": 0.5,
        "top_p": 0.9,
    }


def test_address_key_and_version(bench: Any) -> None:
    script = bench.Script([say(bench, " thirty")])
    gather(bench.make("anthropic", script, continuation="prefill"), bench.continue_query(n=1))
    assert script.urls == ["https://api.anthropic.com/v1/messages"]
    (headers,) = script.headers
    assert headers["x-api-key"] == bench.CANARY
    assert headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in headers
    assert AnthropicConfig(model="m").api_key_env == "ANTHROPIC_API_KEY"


def test_settings_of_the_request(bench: Any) -> None:
    query = bench.continue_query()
    bare = sent(bench, query, continuation="prefill", temperature=None, thinking="off", thinking_tokens=100)
    assert "temperature" not in bare and "top_p" not in bare
    assert bare["thinking"] == {"type": "disabled"}
    assert bare["max_tokens"] == 116
    assert sent(bench, query, continuation="prefill", extra_body={"top_k": 5})["top_k"] == 5
    turns = ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")
    chat = Prompt("p", tuple(Message(role, text) for role, text in turns))
    body = sent(bench, replace(query, prompt=chat), continuation="prefill", system="Be exact.")
    assert body["system"] == "Be exact.\n\nBe brief."
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user", "assistant"]


def test_one_text_per_call_and_no_seed(bench: Any) -> None:
    script = bench.Script(lambda body: say(bench, f" thirty-{script.calls}"))
    (evidence,) = gather(bench.make("anthropic", script, continuation="prefill"), bench.continue_query(n=3))
    assert {reply.text for reply in evidence.replies} == {" thirty-1", " thirty-2", " thirty-3"}
    assert script.calls == evidence.usage.calls == 3
    assert not any({"n", "seed"} & body.keys() for body in script.bodies)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": True}, "n"),
        ({"seed": "auto"}, "seed"),
        ({"logprobs": 3}, "must be 0: the Messages API gives no log-probs"),
        ({"extra_body": {"messages": []}}, "must not hold messages"),
        ({"continuation": "rawer"}, "continuation"),
    ],
)
def test_settings_that_the_format_lacks_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as error:
        AnthropicConfig(model="m", **settings)
    assert words in str(error.value)


def test_what_changes_an_answer_is_in_the_fingerprint(bench: Any) -> None:
    settings = [{}, {"cache": True}, {"thinking": "off"}, {"temperature": 0.5}, {"top_p": 0.5}, {"system": "x"}]
    assert len({bench.make("anthropic", **one).fingerprint for one in settings}) == len(settings)
    assert bench.CANARY not in json.dumps(bench.make("anthropic").backend.record())


# ---------------------------------------------------------------------- the prompt cache


def growing() -> list[str]:
    """The prefixes of one rollout: each begins with the one before."""
    words = " ".join(f"step {i}: add {i} to the sum." + "\n" * (i % 7 == 0) for i in range(900))
    return [words[:end].rstrip() for end in range(900, len(words), 1700)]


def test_pieces_stay_where_they_are_when_the_text_grows() -> None:
    texts = growing()
    for shorter, longer in pairwise(texts):
        assert "".join(pieces(shorter)) == shorter
        assert pieces(longer)[: len(pieces(shorter)) - 1] == pieces(shorter)[:-1]
    assert len(pieces(texts[-1])) > 10
    for text in ("", "x" * 9 * PIECE, "x" * PIECE + " " * PIECE, ("x" * PIECE + "\n" * 5) * 3, " y" * 2 * PIECE):
        assert "".join(pieces(text)) == text
        assert len(pieces(text)) == 1 or all(piece.strip() for piece in pieces(text))
    assert [len(piece) for piece in pieces("x" * PIECE + " " * 50 + "y")] == [PIECE, 51]


class Cache:
    """A server's prompt cache by the API's rules: at most four marks, each looks back over 20 blocks."""

    def __init__(self, bench: Any) -> None:
        self.bench, self.seen = bench, set[str]()

    def __call__(self, body: dict[str, Any]) -> Any:
        blocks = [*body["system"], *(block for turn in body["messages"] for block in turn["content"])]
        assert all(block["text"].strip() for block in blocks)
        marks = [place for place, block in enumerate(blocks) if "cache_control" in block]
        assert 0 < len(marks) <= 4 and marks[-1] == len(blocks) - 1
        upto = [json.dumps([block["text"] for block in blocks[: place + 1]]) for place in range(len(blocks))]
        size = [sum(len(block["text"]) for block in blocks[: place + 1]) for place in range(len(blocks))]
        hits = [place for mark in marks for place in range(max(0, mark - 19), mark + 1) if upto[place] in self.seen]
        read = size[max(hits)] if hits else 0
        self.seen |= {upto[mark] for mark in marks}
        written = size[-1] - read
        counts = {"input_tokens": 0, "cache_read_input_tokens": read, "cache_creation_input_tokens": written}
        return say(self.bench, " and so on", **counts)


@pytest.mark.parametrize("rung", ["prefill", "instruct"])
def test_a_growing_prefix_and_further_draws_hit_the_cache(bench: Any, rung: str) -> None:
    script, texts = bench.Script(Cache(bench)), growing()
    teacher = bench.make("anthropic", script, continuation=rung, cache=True, system="Be exact.")
    queries = [bench.continue_query(prefix=text, n=3, start=start) for start, text in enumerate(texts)]
    usages = [evidence.usage for evidence in gather(teacher, *queries)]
    sizes = [usage.prompt_tokens / 3 for usage in usages]
    for usage, before, size in zip(usages[1:], sizes, sizes[1:], strict=False):
        assert usage.cache_write_tokens <= size - before + PIECE + 300  # what is new, and a piece that was not whole
        assert usage.cache_read_tokens == usage.prompt_tokens - usage.cache_write_tokens
    if rung == "prefill":
        turns = [body["messages"][-1]["content"] for body in script.bodies]
        assert ["".join(block["text"] for block in turn) for turn in turns[::3]] == texts
    # Another rollout of the same prompt shares system text and task.
    (other,) = gather(teacher, bench.continue_query(prefix="Another way.", row=1, start=1, n=1))
    shared = "Be exact." if rung == "instruct" else "Be exact." + QUESTION["content"]
    assert other.usage.cache_read_tokens == len(shared)


def test_without_cache_nothing_is_marked(bench: Any) -> None:
    assert "cache_control" not in json.dumps(sent(bench, bench.continue_query(), continuation="prefill", system="x"))


# ---------------------------------------------------------------------- replies


def test_text_blocks_are_joined_and_white_space_is_kept(bench: Any) -> None:
    said = say(
        bench, "\n thirty", {"type": "tool_use", "id": "t", "name": "n", "input": {}}, " and 12 \n", stop="max_tokens"
    )
    teacher = bench.make("anthropic", bench.Script([said]), continuation="prefill")
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert evidence.replies == (Reply("\n thirty and 12 \n", "length"),)
    (draw,) = bench.store.get_many(teacher.manner.ask(evidence.query).keys(1)).values()
    assert (draw.model, draw.prompt_tokens, draw.completion_tokens) == ("scripted-1", 100, 10)


@pytest.mark.parametrize(
    ("stop", "rejected", "finish"),
    [
        ("end_turn", {}, "stop"),
        ("stop_sequence", {}, "stop"),
        ("max_tokens", {}, "length"),
        ("refusal", {"refusal": 1}, ""),
        ("tool_use", {"error": 1}, ""),
        ("pause_turn", {"error": 1}, ""),
        ("model_context_window_exceeded", {"error": 1}, ""),
        (None, {"error": 1}, ""),
    ],
)
def test_how_a_reply_ends(bench: Any, stop: Any, rejected: dict[str, int], finish: str) -> None:
    script = bench.Script([say(bench, " thirty", stop=stop)])
    (evidence,) = gather(bench.make("anthropic", script, continuation="prefill"), bench.continue_query(n=1))
    assert evidence.rejected == rejected
    assert [reply.finish for reply in evidence.replies] == ([finish] if finish else [])


def test_hidden_thought_and_silence_have_their_own_reasons(bench: Any) -> None:
    def rejected(said: Any, seed: int) -> Any:
        teacher = bench.make("anthropic", bench.Script([said]), continuation="prefill")
        return gather(teacher, bench.continue_query(n=1, seed=seed))[0].rejected

    assert rejected(say(bench), 1) == {"empty": 1}
    assert rejected(say(bench, {"type": "thinking", "thinking": "hm"}, stop="max_tokens"), 2) == {"only_reasoning": 1}
    assert rejected(say(bench, {"type": "redacted_thinking", "data": "="}, stop="max_tokens"), 3) == {
        "only_reasoning": 1
    }
    hidden = say(bench, stop="max_tokens", output_tokens_details={"thinking_tokens": 10})
    assert rejected(hidden, 4) == {"only_reasoning": 1}


def test_usage_counts_all_input_and_is_paid_at_its_prices(bench: Any) -> None:
    said = say(
        bench,
        " thirty",
        input_tokens=3,
        cache_read_input_tokens=2000,
        cache_creation_input_tokens=500,
        output_tokens=40,
        output_tokens_details={"thinking_tokens": 30},
    )
    price = {"prompt": 4.0, "completion": 20.0, "cache_read": 0.4, "cache_write": 5.0}
    teacher = bench.make("anthropic", bench.Script([said]), continuation="prefill", price=price)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    cost = (3 * 4.0 + 2000 * 0.4 + 500 * 5.0 + 40 * 20.0) / 1e6
    assert evidence.usage == Usage(1, 0, 2503, 40, pytest.approx(cost), 2000, 500, 30)


@pytest.mark.parametrize(
    "body",
    [
        {"content": None, "stop_reason": "end_turn"},
        {"content": "thirty", "stop_reason": "end_turn"},
        {"content": ["thirty"], "stop_reason": "end_turn"},
        {"content": [{"type": "text", "text": None}], "stop_reason": "end_turn"},
        {"choices": []},
        [1],
        None,
    ],
)
def test_a_malformed_reply_is_asked_for_again(bench: Any, body: Any) -> None:
    script = bench.Script([bench.Said(body=body), say(bench, " thirty")])
    (evidence,) = gather(bench.make("anthropic", script, continuation="prefill"), bench.continue_query(n=1))
    assert (len(evidence.replies), evidence.usage.calls) == (1, 2)


# ---------------------------------------------------------------------- errors

BAD = "invalid_request_error"
MONEY, LONG, LIMIT = "no money left", "context_overflow", "teacher.thinking_tokens"


@pytest.mark.parametrize(
    ("status", "kind", "message", "more", "action", "which"),
    [
        (529, "overloaded_error", "Overloaded", {}, "retry", "error"),
        (429, "overloaded_error", "Overloaded", {}, "retry", "error"),
        (200, "overloaded_error", "Overloaded", {}, "retry", "error"),
        (200, "api_error", "Internal server error", {}, "retry", "error"),
        (500, "api_error", "Internal server error", {}, "retry", "error"),
        (504, "timeout_error", "timed out", {}, "retry", "error"),
        (500, "InternalServerError", "EngineCore encountered an issue", {}, "retry", "error"),
        (429, "rate_limit_error", "This would exceed your organization's rate limit", {}, "throttle", "error"),
        (200, "rate_limit_error", "This would exceed your organization's rate limit", {}, "throttle", "error"),
        (429, "rate_limit_error", "spent", {"details": {"error_code": "enforced_spend_limit_reached"}}, "stop", MONEY),
        (402, "billing_error", "Payment required", {}, "stop", MONEY),
        (403, "billing_error", "Payment required", {}, "stop", MONEY),
        (400, BAD, "Your credit balance is too low to access the Anthropic API.", {}, "stop", MONEY),
        (400, BAD, "You have reached your specified API usage limits.", {}, "stop", MONEY),
        (401, "authentication_error", "invalid x-api-key", {}, "ask", "OMNI_TEST_KEY"),
        (403, "permission_error", "no access", {}, "ask", "OMNI_TEST_KEY"),
        (404, "not_found_error", "model: scripted", {}, "ask", "teacher.model"),
        (404, "NotFoundError", "The model `scripted` does not exist.", {}, "ask", "teacher.model"),
        (400, BAD, "Invalid model name passed in model=scripted", {}, "ask", "teacher.model"),
        (400, BAD, "max_tokens: 99999 > 64000, the maximum allowed number of output tokens", {}, "ask", LIMIT),
        (400, "BadRequestError", "max_tokens=5000 cannot be greater than max_model_len=1024.", {}, "ask", LIMIT),
        (405, BAD, "Method Not Allowed", {}, "ask", "teacher.base_url"),
        (400, BAD, "prompt is too long: 210000 tokens > 200000 maximum", {}, "drop", LONG),
        (400, BAD, "input length and `max_tokens` exceed context limit: 199000 + 2000 > 200000", {}, "drop", LONG),
        (400, "BadRequestError", "This model's maximum context length is 1024 tokens.", {}, "drop", LONG),
        (413, "request_too_large", "Request exceeds the maximum size", {}, "drop", LONG),
        (400, BAD, "Output blocked by content filtering policy", {}, "drop", "filtered"),
        (400, BAD, "messages: final assistant content cannot end with trailing whitespace", {}, "drop", "error"),
        (400, BAD, "messages: text content blocks must be non-empty", {}, "drop", "error"),
        (400, BAD, "messages: text content blocks must contain non-whitespace text", {}, "drop", "error"),
        (400, BAD, NO_PREFILL, {}, "downgrade", "prefill"),
        (400, BAD, "a final `assistant` message must start with a thinking block", {}, "downgrade", "prefill"),
        (400, BAD, "`temperature` is deprecated for this model.", {}, "downgrade", "temperature"),
        (400, BAD, "temperature: range: 0..1", {}, "downgrade", "temperature"),
        (400, "Bad Request", "1 validation error", {"param": "body.temperature"}, "downgrade", "temperature"),
        (400, BAD, "`temperature` and `top_p` cannot both be specified for this model.", {}, "downgrade", "top_p"),
        (400, BAD, "top_p: range: 0..1", {}, "downgrade", "top_p"),
        (400, BAD, "A maximum of 4 blocks with cache_control may be provided.", {}, "downgrade", "cache"),
        (400, BAD, "thinking.type: disabled is not supported", {}, "downgrade", "thinking"),
        (400, BAD, "Invalid request data", {}, "downgrade", ""),
    ],
)  # fmt: skip
def test_errors(bench: Any, status: int, kind: str, message: str, more: Any, action: str, which: str) -> None:
    said = fault(bench, status, kind, message, **more)
    verdict = bench.make("anthropic").backend.classify(status, said.body)
    assert verdict.action == action
    assert "https://api.anthropic.com/v1" in verdict.message
    if action in ("drop", "retry", "throttle"):
        assert verdict.reason == which
    elif action == "downgrade":
        assert verdict.param == which
        assert (
            f"set teacher.{'continuation: instruct' if which == 'prefill' else which}" in verdict.message or not which
        )
    else:
        assert which in verdict.message


@pytest.mark.parametrize(
    ("status", "body", "action"),
    [
        (401, {"error": "Unauthorized"}, "ask"),
        (400, {"error": {"message": "No connected db.", "type": "no_db_connection", "code": "400"}}, "ask"),
        (502, None, "retry"),
        (429, None, "throttle"),
        (404, {"detail": "Not Found"}, "ask"),
        (400, ["?"], "downgrade"),
    ],
)
def test_errors_of_servers_and_proxies_in_another_shape(bench: Any, status: int, body: Any, action: str) -> None:
    assert bench.make("anthropic").backend.classify(status, body).action == action


def test_a_good_reply_is_no_error(bench: Any) -> None:
    assert bench.make("anthropic").backend.classify(200, say(bench, "error").body) is None


def test_an_overload_passes(bench: Any) -> None:
    script = bench.Script([fault(bench, 529, "overloaded_error", "Overloaded"), say(bench, " thirty")])
    (evidence,) = gather(bench.make("anthropic", script, continuation="prefill"), bench.continue_query(n=1))
    assert (len(evidence.replies), evidence.usage.calls) == (1, 2)


# ---------------------------------------------------------------------- the ladder


def later(bench: Any) -> Any:
    """A model that refuses an open assistant turn and echoes what it is told to."""

    def answer(body: dict[str, Any]) -> Any:
        if body["messages"][-1]["role"] == "assistant":
            return fault(bench, 400, "invalid_request_error", NO_PREFILL)
        return say(bench, f"{ladder.echo_of(bench.PREFIX)} thirty.")

    return bench.Script(answer)


def test_auto_falls_to_instruct_where_prefill_is_refused(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    script = later(bench)
    teacher = bench.make("anthropic", script)
    (evidence,) = gather(teacher, bench.continue_query(n=2))
    assert evidence.replies == (Reply(" thirty.", "stop"),) * 2
    assert teacher.capabilities.continuation == "instruct"
    assert [body["messages"][-1]["role"] for body in script.bodies] == ["assistant", "user", "user"]
    assert "must end with a user message" in caplog.text
    script.bodies.clear()
    gather(bench.make("anthropic", script), bench.continue_query(n=1, seed=999))
    assert [body["messages"][-1]["role"] for body in script.bodies] == ["user"]  # the store remembers


def test_prefill_by_name_is_refused_in_one_line(bench: Any) -> None:
    script = later(bench)
    with pytest.raises(TeacherError) as error:
        gather(bench.make("anthropic", script, continuation="prefill"), bench.continue_query())
    assert "set teacher.continuation: instruct" in str(error.value)
    assert "\n" not in str(error.value)
    assert bench.CANARY not in str(error.value)
    assert script.calls == 1


def test_auto_takes_prefill_where_the_turn_goes_on(bench: Any) -> None:
    script = bench.Script([say(bench, " 5, 6"), say(bench, " thirty")])
    teacher = bench.make("anthropic", script)
    (evidence,) = gather(teacher, bench.continue_query(n=1))
    assert teacher.capabilities.continuation == "prefill"
    assert evidence.replies == (Reply(" thirty", "stop"),)
    assert script.bodies[0]["messages"][-1] == {"role": "assistant", "content": "1, 2, 3, 4,"}
