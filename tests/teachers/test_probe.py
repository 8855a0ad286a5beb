"""The probe: every finding confirmed by a server that keeps its word and refuted by one that lies in that very point."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from honest import LIES, Honest, unit

from omniopd.chat import ChatTemplate
from omniopd.errors import BudgetSpent, ConfigError, TeacherError
from omniopd.ledger import Ledger, Price
from omniopd.store import Store
from omniopd.types import Message, Prompt
from teachers.client import ApiTeacher
from teachers.findings import Record, disproved, refuse_disproved
from teachers.local import local_server
from teachers.openai import OpenAIConfig, OpenAITeacher
from teachers.probe import at_most, probe, questions
from teachers.transformers import TransformersConfig, TransformersTeacher

DEMO = str(Path(__file__).resolve().parents[2] / "examples" / "demo" / "teacher")
QUESTION = "Ann has 12 apples. Ann buys 7 more. Ann gives 5 to Ben. How many apples does Ann have now?"
PROMPT = Prompt("p", (Message("user", QUESTION),))


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.load(DEMO, "teacher.tokenizer")


def asked(bench: Any, server: Honest, kind: str = "vllm", **settings: Any) -> tuple[ApiTeacher, Record]:
    """A teacher that asks this server, and what its probe found."""
    script = bench.Script(lambda body: bench.Said(*server(body)))
    if kind in ("vllm", "echo"):
        settings = {"tokenizer": DEMO, **settings}
    if kind != "vllm":
        settings = {"preset": "generic", **settings}
    base_url = "http://127.0.0.1:9/v1"
    teacher = bench.make("vllm" if kind == "vllm" else "openai", script, model="honest", base_url=base_url, **settings)
    return teacher, asyncio.run(probe(teacher, PROMPT))


def verdicts(record: Record) -> dict[str, str]:
    return {found.name: found.verdict for found in record.findings}


def words(record: Record, name: str) -> str:
    return next(found.found for found in record.findings if found.name == name)


def value(record: Record, name: str) -> float | None:
    return next(found.value for found in record.findings if found.name == name)


@pytest.mark.parametrize("kind", ["vllm", "echo"])
def test_an_honest_server_is_confirmed_in_every_point(bench: Any, chat: ChatTemplate, kind: str) -> None:
    server = Honest(chat=chat)
    teacher, record = asked(bench, server, kind)
    assert [found.name for found in record.findings] == [question.name for question in questions(teacher)]
    assert set(verdicts(record).values()) == {"confirmed"}, record.findings
    assert (record.rung, record.model) == ("raw", "honest")
    assert value(record, "n") == 3
    assert value(record, "gen_logprobs") == 20  # the server's ceiling: 100 was refused
    assert value(record, "token_limit") == 5
    assert value(record, "prompt_cache") > 1000  # type: ignore[operator]
    assert {found.name for found in record.findings} >= {
        "continuation.raw",
        "continuation.prefill",
        "continuation.instruct",
    }


# The lie, the finding that it is found out by, its verdict, and a word of what was seen.
FOUND_OUT = [
    ("n", "n", "refuted", "1 of 3"),
    ("n_same", "n", "refuted", "all of one text"),
    ("n_refused", "n", "refuted", "refused"),
    ("seed", "seed", "refuted", "0 of 5"),
    ("seed_refused", "seed", "refuted", "refuses"),
    ("temperature", "temperature", "refuted", "6 different of 6 at 0"),
    ("temperature_0_refused", "temperature", "refuted", "refused"),
    ("limit", "token_limit", "refuted", "44 tokens"),
    ("restart", "continuation.prefill", "refuted", "1, 2, 3, 4, 5"),
    ("open_turn_refused", "continuation.prefill", "refuted", "refused"),
    ("logprobs_refused", "gen_logprobs", "refuted", "refused"),
    ("logprobs_ignored", "gen_logprobs", "refuted", "holds none"),
    ("logprobs_equal", "gen_logprobs", "refuted", "all log-probs are -0.5"),
    ("logprobs_positive", "gen_logprobs", "refuted", "above 0"),
    ("logprobs_strange", "gen_logprobs", "refuted", "holds none"),
    ("logprobs_after", "logprobs_before_temperature", "refuted", "-0.400 at temperature 1, -0.800 at 0.5"),
    ("scores_ignored", "prompt_logprobs", "refuted", "ignores"),
    ("scores_equal", "prompt_logprobs", "refuted", "the same log-prob"),
    ("scores_late", "prompt_logprobs", "refuted", "changes no value"),
    ("scores_early", "prompt_logprobs", "refuted", "changes values before it"),
    ("scores_change", "prompt_logprobs", "refuted", "when asked again"),
    ("usage", "usage", "refuted", "no usage"),
    ("count", "tokenizer", "refuted", "by the server"),
    ("cache", "prompt_cache", "refuted", "0 of"),
    ("cache_always", "prompt_cache", "refuted", "never sent before"),
    ("unknown", "unknown_field_refused", "refuted", "silently ignored"),
    ("model", "wrong_model_refused", "refuted", "as 'honest'"),
    ("thinking", "no_thinking", "refuted", "8 hidden tokens, visible text ''"),
    ("thinking_told", "no_thinking", "refuted", "8 hidden tokens"),
    ("thinking_text", "no_thinking", "refuted", "after a thought"),
    ("blank", "answer", "refuted", "answers as 'honest': ''"),
    ("long_filtered", "prompt_cache", "unknown", "filtered"),
]
# What else a lie takes with it: these can't be told any more.
BESIDE = {
    "temperature": {"half_word"},
    "temperature_0_refused": {"half_word"},
    "restart": {"half_word"},
    "open_turn_refused": {"half_word"},
    "logprobs_refused": {"logprobs_before_temperature"},
    "logprobs_ignored": {"logprobs_before_temperature"},
    "logprobs_strange": {"logprobs_before_temperature"},
    "logprobs_positive": {"logprobs_before_temperature"},
    "usage": {"token_limit", "tokenizer", "prompt_cache"},
    "count": set(),
    "thinking": {
        "answer",
        "continuation",
        "token_limit",
        "n",
        "seed",
        "temperature",
        "half_word",
        "gen_logprobs",
        "logprobs_before_temperature",
    },
    "thinking_told": {"token_limit"},
    "thinking_text": {"continuation", "half_word", "token_limit", "gen_logprobs"},
    "long_filtered": {"continuation.instruct"},  # whose question is long
    "blank": {
        "continuation",
        "token_limit",
        "n",
        "seed",
        "temperature",
        "half_word",
        "no_thinking",
        "gen_logprobs",
        "logprobs_before_temperature",
    },
}


def test_every_lie_is_tried() -> None:
    assert [lie for lie, *_ in FOUND_OUT if lie not in LIES] == []
    assert set(LIES) == {lie for lie, *_ in FOUND_OUT}


@pytest.mark.parametrize(("lie", "name", "verdict", "said"), FOUND_OUT)
def test_a_lie_is_found_out_and_spoils_no_other_finding(
    bench: Any, chat: ChatTemplate, lie: str, name: str, verdict: str, said: str
) -> None:
    # Without the rung raw, which needs no open turn of the server's.
    _, record = asked(bench, Honest(lie, chat=chat), "vllm" if lie.startswith("scores") or lie == "count" else "chat")
    seen = verdicts(record)
    assert seen[name] == verdict, words(record, name)
    assert said in words(record, name)
    untold = {"prompt_logprobs", "tokenizer"}  # no tokenizer is configured
    others = {
        other: found
        for other, found in seen.items()
        if found != "confirmed" and other != name and other not in untold
        if not any(other.startswith(also) for also in BESIDE.get(lie, ()))
    }
    assert others == {}


# ---------------------------------------------------------------------- the record, and what follows from it


def test_the_record_is_kept_and_auto_takes_its_rung_from_it_without_a_call(bench: Any) -> None:
    server = Honest("restart")
    _, record = asked(bench, server, "chat")
    assert record.rung == "instruct"
    before = len(server.bodies)
    script = bench.Script(lambda body: bench.Said(*server(body)))
    teacher = bench.make("openai", script, model="honest", preset="generic", base_url="http://127.0.0.1:9/v1")
    assert (
        teacher.probe
        == bench.store.probe(record.fingerprint)
        == record.to_json() | {"findings": [vars_of(found) for found in record.findings]}
    )
    (found,) = asyncio.run(teacher.gather([bench.continue_query(n=2)]))
    assert teacher.capabilities.continuation == "instruct"
    assert (len(server.bodies) - before, len(found.replies)) == (1, 2)
    assert "<begun>" in server.bodies[-1]["messages"][-1]["content"]


def vars_of(found: Any) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("name", "verdict", "found", "value")}


@pytest.mark.parametrize("kind", ["vllm", "chat"])
def test_every_call_of_a_probe_is_booked_as_one(bench: Any, chat: ChatTemplate, kind: str) -> None:
    server = Honest("unknown", "model", chat=chat)  # whose answers to deliberate errors are paid for too
    _, record = asked(bench, server, kind, price={"prompt": 1.0, "completion": 10.0})
    booked = list(bench.store.calls())
    assert {call["purpose"] for call in booked} == {"probe"}
    refused = 1  # the request for 100 log-probs
    assert len(booked) == len(server.bodies) - refused == record.usage.calls
    assert record.usage.cost_usd == pytest.approx(sum(call["cost_usd"] for call in booked))
    assert record.usage.cost_usd == pytest.approx(
        (record.usage.prompt_tokens + 10 * record.usage.completion_tokens) / 1e6
    )
    assert not list(bench.store.draws())  # no answer of a probe is one of a run


@pytest.mark.parametrize(
    ("lies", "settings"),
    [
        ((), {}),
        (("restart",), {"system": "Be brief. " * 20}),
        (("n_same", "logprobs_refused"), {"thinking_tokens": 500}),
        (("open_turn_refused", "cache"), {"temperature": None}),
    ],
)
def test_a_probe_uses_no_more_than_is_said_beforehand(
    bench: Any, chat: ChatTemplate, lies: tuple[str, ...], settings: dict[str, Any]
) -> None:
    server = Honest(*lies, counts=False, chat=chat)
    teacher, record = asked(bench, server, "chat", **settings)
    most = at_most(teacher, PROMPT, lambda text: len(chat.encode(text)[0]))
    assert len(server.bodies) <= most.calls
    assert record.usage.prompt_tokens <= most.prompt_tokens
    assert record.usage.completion_tokens <= most.completion_tokens
    assert all(body["max_tokens"] <= most.completion_tokens / most.calls for body in server.bodies)


def test_no_question_takes_more_calls_than_it_says(bench: Any, chat: ChatTemplate) -> None:
    """Of every question the dearest course is taken by one of these servers."""
    seen: dict[str, int] = {}
    said: dict[str, int] = {}
    for lies in ((), ("restart",), ("n_same", "logprobs_refused"), ("long_filtered",)):
        server = Honest(*lies, counts=False, chat=chat)
        script = bench.Script(lambda body, server=server: bench.Said(*server(body)))
        teacher = bench.make("vllm", script, model="honest", tokenizer=DEMO, logprobs=7)
        said = {question.name: question.calls for question in questions(teacher)}
        marks = [0]
        asyncio.run(probe(teacher, PROMPT, lambda done, server=server, marks=marks: marks.append(len(server.bodies))))
        for name, (before, after) in zip(said, pairwise(marks), strict=True):
            seen[name] = max(seen.get(name, 0), after - before)
    assert {name: (seen[name], calls) for name, calls in said.items() if seen[name] > calls} == {}
    # A beginning that is too sure, and a long prompt that is answered once only, are not among them.
    rare = {"logprobs_before_temperature", "prompt_cache"}
    assert {name for name, calls in said.items() if seen[name] < calls} == rare


def test_money_that_is_not_there_ends_it(bench: Any) -> None:
    server = Honest()
    script = bench.Script(lambda body: bench.Said(*server(body)))
    config = OpenAIConfig(
        model="honest", base_url="http://127.0.0.1:9/v1", api_key_env=None, price=Price(completion=3000.0)
    )
    ledger = Ledger(bench.store, budget_usd=1.0)
    teacher = OpenAITeacher(config, bench.store, ledger, http=script.mock(), sleep=bench.sleep)
    with pytest.raises(BudgetSpent, match="budget_usd"):
        asyncio.run(probe(teacher, PROMPT))
    assert 0 < ledger.spent <= 1.0
    assert teacher.probe is None


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, {"error": {"message": "bad key"}}, "OMNI_TEST_KEY"),
        (404, {"error": {"message": "no such model"}}, "teacher.model"),
        (400, {"error": {"message": "temperature is fixed", "param": "temperature"}}, "teacher.temperature to null"),
        (400, {"error": {"message": "logprobs", "param": "top_p"}}, "teacher.top_p to null"),
        (500, {"error": {"message": "down"}}, "check the server, then probe again"),
    ],
)
def test_a_teacher_that_can_t_be_asked_at_all_is_one_line(bench: Any, status: int, body: Any, said: str) -> None:
    teacher = bench.teacher(bench.Script(lambda _: bench.Said(status, body)))
    with pytest.raises(TeacherError) as error:
        asyncio.run(probe(teacher, PROMPT))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert teacher.probe is None


def test_a_server_that_goes_away_in_the_middle_ends_it(bench: Any) -> None:
    server = Honest()
    script = bench.Script(lambda body: bench.Said(*server(body)) if len(server.bodies) < 20 else bench.Said(503, {}))
    with pytest.raises(TeacherError, match="check the server"):
        asyncio.run(probe(bench.teacher(script, model="honest", continuation="auto"), PROMPT))


def test_a_filtered_question_is_unknown_not_the_end(bench: Any) -> None:
    server, filtered = Honest(), {"error": {"message": "flagged", "code": "content_filter"}}
    script = bench.Script(lambda body: bench.Said(400, filtered) if body.get("n") else bench.Said(*server(body)))
    record = asyncio.run(probe(bench.teacher(script, model="honest", continuation="auto"), PROMPT))
    assert (verdicts(record)["n"], words(record, "n")) == ("unknown", "no answer (filtered)")
    assert verdicts(record)["burst"] == "confirmed"


# The lie, the setting that relies on the opposite, and the mend.
DISPROVED = [
    ("n", {"n": True}, "teacher.n", "set auto or false"),
    ("seed", {"seed": True}, "teacher.seed", "set auto or false"),
    ("temperature", {"temperature": 0.7}, "teacher.temperature", "set 1.0"),
    ("restart", {"continuation": "prefill"}, "teacher.continuation", "set instruct or auto"),
    ("logprobs_ignored", {"logprobs": 5}, "teacher.logprobs", "set 0"),
    ("logprobs_after", {"logprobs": 5, "temperature": 0.5}, "teacher.logprobs", "teacher.temperature to 1.0"),
    ("thinking_told", {"thinking": "off"}, "teacher.thinking", "teacher.thinking_tokens"),
    ("thinking", {}, "teacher.thinking_tokens", "teacher.thinking: off"),
]


@pytest.mark.parametrize(("lie", "settings", "field", "mend"), DISPROVED)
def test_a_setting_that_a_probe_disproves_is_refused_with_its_mend(
    bench: Any, lie: str, settings: dict[str, Any], field: str, mend: str
) -> None:
    teacher, record = asked(bench, Honest(lie), "chat", **settings)
    sentences = disproved(teacher._config, record.to_json())
    assert [sentence for sentence in sentences if sentence.startswith(f"{field}:") and mend in sentence]
    with pytest.raises(ConfigError) as error:
        refuse_disproved(teacher._config, record.to_json())
    assert str(error.value).startswith("teacher.")
    assert "or probe again" in str(error.value)
    assert "\n" not in str(error.value)
    honest, kept = asked(bench, Honest(), "chat", **settings)
    assert disproved(honest._config, kept.to_json()) == []
    refuse_disproved(honest._config, kept.to_json())


def test_settings_that_leave_it_to_the_teacher_are_never_refused(bench: Any) -> None:
    for lie in ("n", "seed", "temperature", "restart", "logprobs_refused", "thinking_told", "cache", "usage"):
        teacher, record = asked(bench, Honest(lie), "chat")
        assert disproved(teacher._config, record.to_json()) == [], lie
    refuse_disproved(teacher._config, None)


def test_more_log_probs_than_the_ceiling_are_refused(bench: Any) -> None:
    teacher, record = asked(bench, Honest(), "chat")
    for asked_for, refused in ((20, False), (21, True)):
        config = teacher._config.model_copy(update={"logprobs": asked_for})
        assert bool(disproved(config, record.to_json())) is refused
    assert "the 20 that the probe found" in disproved(config, record.to_json())[0]


def test_a_configured_number_of_log_probs_is_tried_itself(bench: Any) -> None:
    """Between the numbers that are tried anyway lies one that the server takes."""
    _, record = asked(bench, Honest(), "chat", logprobs=13)
    assert value(record, "gen_logprobs") == 20
    server = Honest()
    script = bench.Script(
        lambda body: bench.Said(*server(body | {"top_logprobs": 99} if body.get("top_logprobs", 0) > 13 else body))
    )
    teacher = bench.make(
        "openai", script, model="honest", preset="generic", base_url="http://127.0.0.1:9/v1", logprobs=13
    )
    assert value(asyncio.run(probe(teacher, PROMPT)), "gen_logprobs") == 13


@pytest.mark.parametrize(
    ("wide", "ignored", "verdict"),
    [(1, False, "unknown"), (1, True, "unknown"), (2, False, "confirmed"), (2, True, "refuted"), (9, True, "refuted")],
)
def test_draws_that_are_alike_anyway_prove_no_seed(bench: Any, wide: int, ignored: bool, verdict: str) -> None:
    """Of a teacher that is sure of itself some draws are one text whatever the seed: luck is reckoned with."""
    calls = iter(range(1000))

    def say(body: dict[str, Any]) -> Any:
        named = next(calls) if ignored else body.get("seed", 0)
        return bench.say(f"one of {wide}: {int(10 * unit('draw', named)) % wide}", finish="length")

    record = asyncio.run(probe(bench.teacher(bench.Script(say), continuation="auto"), PROMPT))
    assert verdicts(record)["seed"] == verdict, words(record, "seed")


def test_a_server_that_can_t_count_is_proved_by_half_of_its_own_answer(bench: Any) -> None:
    _, record = asked(bench, Honest(counts=False), "chat")
    assert verdicts(record)["continuation.prefill"] == "confirmed"
    assert "half of its own answer" in words(record, "continuation.prefill")
    _, record = asked(bench, Honest("restart", counts=False), "chat")
    assert verdicts(record)["continuation.prefill"] == "refuted"
    assert "it started over" in words(record, "continuation.prefill")


# ---------------------------------------------------------------------- real weights


def test_the_demo_teacher_in_this_process(tmp_path: Path) -> None:
    """It can't count, and is what an adapter is measured by: nothing stands between it and its weights."""
    teacher = TransformersTeacher(TransformersConfig(path=DEMO), Store(tmp_path / "answers.sqlite"))
    record = asyncio.run(probe(teacher, PROMPT))
    asyncio.run(teacher.close())
    seen = verdicts(record)
    assert record.rung == "raw"
    assert "half of its own answer" in words(record, "continuation.raw")
    yes = {"answer", "continuation.raw", "n", "seed", "temperature", "token_limit", "no_thinking", "gen_logprobs"}
    yes |= {"logprobs_before_temperature", "prompt_logprobs", "usage", "tokenizer", "burst"}
    assert {name for name, verdict in seen.items() if verdict == "confirmed"} - {"half_word"} == yes
    assert seen["prompt_cache"] == "refuted"
    assert seen["unknown_field_refused"] == seen["wrong_model_refused"] == "unknown"


@pytest.mark.timeout(180)
def test_the_demo_teacher_over_http(tmp_path: Path) -> None:
    with local_server(DEMO) as url:
        config = OpenAIConfig(base_url=url, model="teacher", api_key_env=None, tokenizer=None)
        teacher = OpenAITeacher(config, Store(tmp_path / "answers.sqlite"))
        record = asyncio.run(probe(teacher, PROMPT))
    seen = verdicts(record)
    assert record.rung == "prefill"
    assert "half of its own answer" in words(record, "continuation.prefill")
    yes = {"answer", "continuation.prefill", "n", "seed", "temperature", "token_limit", "no_thinking", "usage", "burst"}
    assert {name for name, verdict in seen.items() if verdict == "confirmed"} - {"half_word"} == yes
    # What serve.py says of itself: no log-probs, other fields and names are ignored.
    assert seen["gen_logprobs"] == seen["unknown_field_refused"] == seen["wrong_model_refused"] == "refuted"
    assert "not offered" in words(record, "gen_logprobs")
