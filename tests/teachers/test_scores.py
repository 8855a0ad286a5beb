"""Scores of a response from a server: what is sent, where each value lands, what is kept, and how holes stay holes.

The canary of these tests: the log-prob of the token at place t of what was sent is -t.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from omniopd.errors import BudgetSpent, ConfigError, StoreError, TeacherError
from omniopd.ledger import Ledger
from omniopd.method import missing
from omniopd.registry import TEACHERS
from omniopd.types import Message, Prompt, ScoreQuery, TokenScores, Usage
from omniopd.vocabulary import Vocabulary
from teachers.asks import Manner
from teachers.given import draw_of, passage, token_scores
from teachers.replay import ReplayConfig, ReplayTeacher
from teachers.scoring import Scores

TEXT = "The answer is 12 + 7 = 19, café 😀."
OTHERS = (300, 310, 319)  # likelier than the given token, everywhere
LONG = 30  # tokens: more are sent for TEXT, fewer for a few words


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The student's own tokenizer, and one of another family."""
    made = {"own": tiny.byte_level(), "other": tiny.pieces()}
    paths = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(paths[name])
    return {name: str(path) for name, path in paths.items()}


def query(text: str = TEXT, *, row: int = 0, closes: bool = True, **settings: Any) -> ScoreQuery:
    """A response as a student with the byte-level tokenizer writes it."""
    tokenizer = tiny.byte_level()
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    end = (tokenizer.eos_token_id,) if closes else ()
    return ScoreQuery(tiny.prompt(), row, (*ids, *end), Vocabulary(tokenizer).digest, text, closes, **settings)


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def sent(body: dict[str, Any]) -> list[int]:
    """The ids of a request; one that sends text is read with the student's tokenizer."""
    ids = body.get("prompt", body.get("input_ids"))
    return tiny.byte_level().encode(ids, add_special_tokens=False) if isinstance(ids, str) else ids


def tops(place: int, own: int) -> dict[int, float]:
    """Three likelier tokens, then (where none of them is) the given one."""
    return {other: -place + 0.5 - 0.1 * i for i, other in enumerate(OTHERS) if other != own} | {own: float(-place)}


def vllm_says(body: dict[str, Any]) -> dict[str, Any]:
    ids, k = sent(body), body["prompt_logprobs"]
    places: list[Any] = [None]
    for place, own in enumerate(ids[1:], start=1):
        best = dict(sorted(tops(place, own).items(), key=lambda entry: -entry[1])[:k]) | {own: float(-place)}
        places.append({str(one): {"logprob": value, "rank": 1} for one, value in best.items()})
    usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
    return {"model": "m", "id": "r", "choices": [{"text": "x", "prompt_logprobs": places}], "usage": usage}


def sglang_says(body: dict[str, Any]) -> dict[str, Any]:
    ids = sent(body)
    own = [[None if t == 0 else -float(t), one, None] for t, one in enumerate(ids)]
    top = [None, *([[p, one, None] for one, p in tops(t, ids[t]).items()] for t in range(1, len(ids)))]
    return {
        "text": "",
        "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top, "prompt_tokens": len(ids)},
    }


def echo_says(body: dict[str, Any]) -> dict[str, Any]:
    ids = sent(body)
    said = {"token_logprobs": [None, *(-float(t) for t in range(1, len(ids)))], "token_ids": list(ids)}
    if isinstance(body["prompt"], str):  # Together
        return {"prompt": [{"text": "", "logprobs": said}], "choices": [{"text": "x"}]}
    said = {"token_logprobs": [*said["token_logprobs"], -9.0], "token_ids": [*ids, 3]}
    return {"choices": [{"text": "x", "logprobs": said}]}


DOORS: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "vllm": ("vllm", {}, vllm_says),
    "sglang": ("sglang", {}, sglang_says),
    "fireworks": ("openai", {"preset": "fireworks"}, echo_says),
    "together": ("openai", {"preset": "together"}, echo_says),
}


@pytest.fixture
def make(bench: Any, folders: dict[str, str]) -> Callable[..., tuple[Any, Any]]:
    """A teacher behind one of the doors, and the script behind that; `says` changes what it says."""

    def build(door: str = "vllm", says: Any = None, tokenizer: str = "own", **settings: Any) -> tuple[Any, Any]:
        kind, known, honest = DOORS[door]
        script = bench.Script(lambda body: bench.Said(body=(says or honest)(body)))
        return bench.make(kind, script, **{"tokenizer": folders[tokenizer], **known, **settings}), script

    return build


def canary(teacher: Any, asked: ScoreQuery, count: int) -> list[float]:
    start = len(teacher.backend.chat.ids(asked.prompt.messages))
    return [-float(start + place) for place in range(count)]


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("door", DOORS)
def test_r1_each_value_lands_on_its_own_token(make: Any, door: str) -> None:
    teacher, script = make(door)
    asked = query()
    (found,) = gather(teacher, asked)
    assert isinstance(found, TokenScores)
    assert found.ids == asked.ids and found.query is asked
    assert list(found.logprobs) == canary(teacher, asked, len(asked.ids))
    assert found.top == ()
    assert found.vocabulary is teacher.backend.chat.vocabulary
    assert (script.calls, found.usage.calls, found.rejected) == (1, 1, {})
    prompt = len(teacher.backend.chat.ids(asked.prompt.messages))
    assert found.usage.prompt_tokens == prompt + len(asked.ids)
    spelling = found.vocabulary.spell(asked.ids)
    assert found.ends == spelling.ends and found.ends[-1] == found.ends[-2] == len(TEXT.encode())


@pytest.mark.parametrize("door", DOORS)
def test_r1_a_prompt_that_quotes_the_answer_is_not_taken_for_it(make: Any, door: str) -> None:
    """Where the response begins is counted, not searched for."""
    teacher, _ = make(door)
    asked = replace(query(), prompt=tiny.prompt(f"Is this right? {TEXT} Say it again: {TEXT}"))
    (found,) = gather(teacher, asked)
    assert isinstance(found, TokenScores)
    assert list(found.logprobs) == canary(teacher, asked, len(asked.ids))


@pytest.mark.parametrize("door", ["vllm", "sglang"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_r13_the_k_likeliest_by_their_ids_and_the_given_one_by_its_own(make: Any, door: str, k: int) -> None:
    teacher, _ = make(door)
    asked = query(top=k)
    (found,) = gather(teacher, asked)
    start = len(teacher.backend.chat.ids(asked.prompt.messages))
    assert list(found.logprobs) == canary(teacher, asked, len(asked.ids))
    for place, (own, top) in enumerate(zip(asked.ids, found.top, strict=True), start=start):
        best = sorted(tops(place, own).items(), key=lambda entry: -entry[1])[:k]
        assert list(top.items()) == best
        assert (own in top) == (own in dict(best))


def test_r12_padding_of_the_output_layer_is_no_token(make: Any) -> None:
    def padded(body: dict[str, Any]) -> dict[str, Any]:
        said = vllm_says(body)
        for place in said["choices"][0]["prompt_logprobs"][1:]:
            place["320"] = {"logprob": 0.0}  # one past the tokenizer's last id
        return said

    teacher, script = make(says=padded)
    assert teacher.backend.chat.vocabulary.size == 320
    good, hole = gather(teacher, query(top=3), replace(query(row=1), ids=(7, 320)))
    assert all(320 not in top and len(top) == 2 for top in good.top)
    assert (hole.rejected, hole.ids, script.calls) == ({"unknown_token": 1}, (), 1)


def test_a_token_that_is_ruled_out_is_minus_infinity_and_no_alternative(make: Any) -> None:
    def ruled_out(body: dict[str, Any]) -> dict[str, Any]:
        said = vllm_says(body)
        last = said["choices"][0]["prompt_logprobs"][-1]
        for entry in last.values():
            entry["logprob"] = -9999.0  # what vLLM writes for -inf
        return said

    teacher, _ = make(says=ruled_out)
    for found in (*gather(teacher, query(top=3)), *gather(teacher, query(top=3))):
        assert found.logprobs[-1] == -math.inf and found.top[-1] == {}
        assert all(map(math.isfinite, found.logprobs[:-1]))


# ---------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("name", ["own", "other"])
def test_r2_r5_the_prompt_is_the_teachers_template_with_one_bos(make: Any, name: str) -> None:
    teacher, script = make(tokenizer=name)
    (found,) = gather(teacher, query())
    chat = teacher.backend.chat
    assert script.bodies[0]["prompt"] == [*chat.ids(tiny.prompt().messages), *found.ids]
    assert script.bodies[0]["prompt"].count(chat.tokenizer.bos_token_id) == (name == "other")


def test_the_system_text_opens_the_prompt_and_is_part_of_the_key(make: Any) -> None:
    (plain, _), (guided, script) = make(), make(system="Be exact.")
    gather(plain, query())
    (found,) = gather(guided, query())
    messages = (Message("system", "Be exact."), *tiny.prompt().messages)
    assert script.bodies[0]["prompt"] == [*guided.backend.chat.ids(messages), *query().ids]
    assert found.usage.calls == 1


@pytest.mark.parametrize("door", DOORS)
def test_r6_r7_r15_a_scoring_call_states_temperature_1_whatever_writing_has(make: Any, door: str) -> None:
    plain, cool = make(door), make(door, temperature=0.7, top_p=0.5)
    (one,), (other,) = gather(plain[0], query()), gather(cool[0], query())
    assert one.logprobs == other.logprobs
    assert plain[1].bodies == cool[1].bodies
    body = cool[1].bodies[0]
    stated = body.get("sampling_params", body)
    assert (stated["temperature"], stated["top_p"]) == (1.0, 1.0)
    assert stated.get("max_tokens", stated.get("max_new_tokens")) in (0, 1)
    if door in ("vllm", "sglang"):
        assert (stated["top_k"], stated["min_p"], stated["repetition_penalty"]) == (-1, 0.0, 1.0)


@pytest.mark.parametrize("closes", [True, False])
def test_a_teacher_of_another_tokenizer_cuts_the_text_itself(make: Any, closes: bool) -> None:
    teacher, script = make(tokenizer="other")
    asked = query(closes=closes)
    (found,) = gather(teacher, asked)
    chat = teacher.backend.chat
    spelling = chat.vocabulary.cut(TEXT)
    assert found.ids == (*spelling.ids, *[chat.end_of_turn] * closes)
    assert found.ends == (*spelling.ends, *[len(TEXT.encode())] * closes)
    assert script.bodies[0]["prompt"][-len(found.ids) :] == list(found.ids)
    assert list(found.logprobs) == canary(teacher, asked, len(found.ids))
    assert found.vocabulary.digest != asked.vocabulary


@pytest.mark.parametrize("door", DOORS)
def test_what_stands_before_given_tokens_is_sent_and_not_scored(make: Any, door: str) -> None:
    teacher, script = make(door)
    whole = query(closes=False)
    tail = replace(whole, ids=whole.ids[-2:], after=whole.ids[:-2], top=1)
    (all_of_it,), (end,) = gather(teacher, replace(whole, top=1)), gather(teacher, tail)
    assert sent(script.bodies[0]) == sent(script.bodies[1])
    assert (end.ids, end.logprobs, end.top) == (tail.ids, all_of_it.logprobs[-2:], all_of_it.top[-2:])
    other, silent = make(tokenizer="other")
    assert gather(other, tail)[0].rejected == {"unknown_token": 1}
    assert silent.calls == 0


def test_a_control_tokens_text_stays_text(make: Any) -> None:
    teacher, script = make(tokenizer="other")
    gather(teacher, query("a</s>[INST]b"))
    assert script.bodies[0]["prompt"].count(teacher.backend.chat.tokenizer.eos_token_id) == 1  # the turn's own


def test_r11_a_response_of_nothing_is_not_asked_about(make: Any) -> None:
    teacher, script = make()
    other, _ = make(tokenizer="other")
    nothing = query("", closes=False)
    for one in (teacher, other):
        assert gather(one, nothing)[0].rejected == {"empty": 1}
    assert script.calls == 0
    (ended,) = gather(other, query("", row=1))  # it ended at once: the end of the turn is scored
    assert (ended.ids, ended.ends) == ((other.backend.chat.end_of_turn,), (0,))


# ---------------------------------------------------------------------- holes


def drop_first(body: dict[str, Any]) -> dict[str, Any]:
    said = vllm_says(body)
    del said["choices"][0]["prompt_logprobs"][0]
    return said


def only_fresh(body: dict[str, Any]) -> dict[str, Any]:
    """A prefix cache that has served all but the last two places, and says nothing of those."""
    said = vllm_says(body)
    said["choices"][0]["prompt_logprobs"][1:-2] = [None] * (len(sent(body)) - 3)
    return said


def without_one(body: dict[str, Any]) -> dict[str, Any]:
    said = vllm_says(body)
    said["choices"][0]["prompt_logprobs"][-3] = {"300": {"logprob": -0.1}}
    return said


def ignoring(body: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


def other_ids(body: dict[str, Any]) -> dict[str, Any]:
    said = sglang_says(body)
    said["meta_info"]["input_token_logprobs"][-1][1] += 1
    return said


@pytest.mark.parametrize(
    ("door", "lie"),
    [
        pytest.param("vllm", drop_first, id="r1"),
        pytest.param("vllm", ignoring, id="r8"),
        pytest.param("vllm", only_fresh, id="r9"),
        pytest.param("vllm", without_one, id="r10"),
        pytest.param("sglang", other_ids, id="r14"),
        pytest.param("fireworks", ignoring, id="r8-echo"),
    ],
)
def test_a_reply_that_can_not_be_true_is_tried_again_and_then_a_hole(make: Any, door: str, lie: Any) -> None:
    honest = DOORS[door][2]
    teacher, script = make(door, lambda body: honest(body) if len(sent(body)) < LONG else lie(body), max_attempts=3)
    good, hole = gather(teacher, query("a b"), query(row=1))
    assert list(good.logprobs) == canary(teacher, good.query, len(good.ids))
    assert (hole.ids, hole.logprobs, hole.rejected) == ((), (), {"error": 1})
    assert (script.calls, hole.usage.calls) == (4, 3)
    assert teacher._store.stats().answers == 1
    assert gather(teacher, query("a b"), query(row=1))[1].usage.calls == 3  # a hole is asked again


def test_r8_a_server_that_never_scores_ends_the_step_and_says_so(make: Any) -> None:
    teacher, _ = make(says=ignoring, max_attempts=2)
    with pytest.raises(TeacherError, match=r"none of 1 calls brought an answer \(last: .*ignores the field"):
        gather(teacher, query())


def test_s14_what_exceeds_the_context_is_a_counted_hole(bench: Any, make: Any, folders: dict[str, str]) -> None:
    refused = {"message": "This model's maximum context length is 40 tokens", "code": 400}
    long = bench.Said(400, {"error": refused})
    script = bench.Script(lambda body: long if len(sent(body)) > LONG else bench.Said(body=vllm_says(body)))
    good, hole = gather(bench.make("vllm", script, tokenizer=folders["own"]), query("a b"), query(row=1))
    assert (good.rejected, hole.rejected, hole.ids) == ({}, {"context_overflow": 1}, ())


def test_too_many_alternatives_are_refused_in_one_line_with_a_mend(bench: Any, folders: dict[str, str]) -> None:
    said = {"message": "Requested prompt logprobs of 50, which is greater than max allowed: 20", "code": 400}
    script = bench.Script([bench.Said(400, {"error": said})])
    with pytest.raises(TeacherError, match=r"max allowed: 20.*; lower how many .*--max-logprobs"):
        gather(bench.make("vllm", script, tokenizer=folders["own"]), query(top=50))


def test_r10_no_value_is_nan_never_zero(folders: dict[str, str]) -> None:
    teacher = TEACHERS.get("vllm")
    chat = teacher.Backend(teacher.Config(model="m", tokenizer=folders["own"])).chat
    asked = query("abc", closes=False)
    given = passage(Manner("f", "raw", None, 1.0, 1.0, vocabulary=asked.vocabulary).ask(asked), chat)
    values = (None, math.nan, *[-0.5] * (len(given.ids) - 2))
    draw = draw_of(given, Scores(values, ({},) * len(given.ids)), chat.vocabulary)
    assert [value for _, value, *_ in json.loads(json.dumps(draw.tokens))][:2] == [None, None]
    found = token_scores(asked, draw, Usage(), None)
    assert [math.isnan(value) for value in found.logprobs] == [True, True, *[False] * (len(given.ids) - 2)]
    with pytest.raises(ValueError, match="shorter"):  # trap R11
        draw_of(given, Scores(values[1:], ({},) * len(given.ids)), chat.vocabulary)


# ---------------------------------------------------------------------- what is kept and paid


def test_s9_whatever_can_change_a_score_changes_its_key(make: Any, folders: dict[str, str]) -> None:
    manner = make()[0].manner
    one = query()
    others = [
        replace(one, ids=one.ids[:-1]),
        replace(one, closes=False),
        replace(one, top=1),
        replace(one, whole=True),
        replace(one, vocabulary="another"),  # so that the teacher cuts the text
        replace(one, vocabulary="another", text="x"),
        replace(one, vocabulary="another", closes=False),
        replace(one, prompt=tiny.prompt("And 3 + 4?")),
    ]
    asks = [manner.ask(one), *map(manner.ask, others), replace(manner.ask(one), teacher="another")]
    keys = [key for ask in asks for key in ask.keys(1)]
    assert len(set(keys)) == len(keys) == 10
    assert manner.ask(replace(one, row=5)).keys() == keys[:1]
    assert make(tokenizer="other")[0].manner.vocabulary != manner.vocabulary


def test_s10_the_second_gather_calls_nobody_and_says_the_same(make: Any) -> None:
    teacher, script = make()
    queries = [query(), query("Six.", row=1, top=2), query("Six.", row=2, top=2)]
    first, again = gather(teacher, *queries), gather(make()[0], *queries)
    assert script.calls == 2  # equal responses of one step are paid for once
    assert [one.usage.cached_calls for one in first] == [0, 0, 1]
    assert [one.usage for one in again] == [Usage(cached_calls=1)] * 3
    for one, other in zip(first, again, strict=True):
        assert (one.ids, one.ends, one.logprobs, one.top) == (other.ids, other.ends, other.logprobs, other.top)


def test_s10_a_cancelled_gather_keeps_what_is_under_way(bench: Any, folders: dict[str, str]) -> None:
    def says(body: dict[str, Any]) -> Any:
        return bench.Said(body=vllm_says(body), delay_s=1.2 if len(sent(body)) > LONG else 0.0)

    script = bench.Script(says)

    async def cancelled(teacher: Any) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await teacher.gather([query("a b"), query(row=1)])

    with bench.serving(script) as url:
        asyncio.run(cancelled(bench.make("vllm", tokenizer=folders["own"], base_url=url)))
    assert bench.store.stats().answers == 2  # a call under way is paid for
    (kept,) = gather(bench.make("vllm", bench.Script([]), tokenizer=folders["own"], base_url=url), query(row=1))
    assert kept.usage == Usage(cached_calls=1)


def test_money_is_reserved_and_booked(bench: Any, make: Any, folders: dict[str, str]) -> None:
    priced = {"price": {"prompt": 1000.0, "completion": 2000.0}}
    teacher, _ = make(**priced)
    (found,) = gather(teacher, query())
    cost = (found.usage.prompt_tokens * 1000 + 2000) / 1e6
    assert found.usage.cost_usd == pytest.approx(cost)
    (booked,) = bench.store.calls()
    assert (booked["purpose"], booked["draws"], booked["completion_tokens"]) == ("score", 1, 1)
    assert booked["cost_usd"] == pytest.approx(cost)
    assert (booked["model"], booked["request_id"], booked["estimated"]) == ("m", "r", False)
    assert teacher._most_usd(teacher.manner.ask(query()), 1) >= cost
    kind = TEACHERS.get("vllm")
    config = kind.Config(model="scripted", tokenizer=folders["own"], **priced)
    script = bench.Script(lambda body: bench.Said(body=vllm_says(body)))
    poor = kind(config, bench.store, Ledger(bench.store, "poor", budget_usd=0.01), http=script.mock())
    with pytest.raises(BudgetSpent, match="budget_usd"):
        gather(poor, query("Six.", row=1))
    assert script.calls == 0


# ---------------------------------------------------------------------- a recording


def replayed(path: Path) -> ReplayTeacher:
    return ReplayTeacher(ReplayConfig(path=str(path)))


def test_a_replay_says_what_was_recorded_with_its_holes(bench: Any, make: Any) -> None:
    teacher, _ = make(says=lambda body: vllm_says(body) if len(sent(body)) < LONG else ignoring(body), max_attempts=1)
    queries = [query("a b", top=2), query(row=1), query("", row=2, closes=False), replace(query(row=3), ids=(7, 999))]
    first = gather(teacher, *queries)
    again = replayed(bench.path)
    second = gather(again, *queries)
    for one, other in zip(first, second, strict=True):
        assert (one.ids, one.ends, one.logprobs, one.top) == (other.ids, other.ends, other.logprobs, other.top)
        assert one.rejected == other.rejected
    assert [one.rejected for one in second] == [{}, {"error": 1}, {"empty": 1}, {"unknown_token": 1}]
    assert second[0].vocabulary is None and second[0].usage == Usage(cached_calls=1)
    promised = ReplayTeacher.promises(ReplayConfig(path=str(bench.path)))
    assert promised == again.capabilities
    assert (promised.score, promised.topk, promised.logits) == (True, 20, False)
    assert promised.vocabulary == query().vocabulary
    with pytest.raises(StoreError, match=r"never recorded \(prompt 'p', rollout 0, scores of the response\)"):
        gather(again, query("something else"))
    with pytest.raises(StoreError, match="whole distributions are never recorded"):
        gather(again, query("a b", whole=True))


def test_a_replay_of_text_that_the_teacher_cut(bench: Any, make: Any) -> None:
    (first,) = gather(make(tokenizer="other")[0], query(top=3))
    (second,) = gather(replayed(bench.path), query(top=3))
    assert (first.ids, first.ends, first.logprobs) == (second.ids, second.ends, second.logprobs)
    assert (first.top, first.openings) == (second.top, second.openings)


def test_openings_come_with_the_likeliest_tokens_of_text_that_the_teacher_cut(make: Any) -> None:
    """What a token's bytes are worth: at every place the three likelier tokens of this server, where they start with them."""
    (found,) = gather(make(tokenizer="other")[0], query(top=3))
    bytes_of = found.vocabulary.bytes_of
    assert len(found.openings) == len(found.ids)
    for id, own, near, openings in zip(found.ids, found.logprobs, found.top, found.openings, strict=True):
        assert len(openings) == max(1, len(bytes_of[id]))
        for size, opening in enumerate(openings, start=1):
            alike = [p for other, p in near.items() if other != id and bytes_of[other][:size] == bytes_of[id][:size]]
            alike = alike if bytes_of[id] else []
            assert opening == pytest.approx(math.log(sum(map(math.exp, [own, *alike]))), abs=1e-6)
    (plain,) = gather(make(tokenizer="other")[0], query())
    (same,) = gather(make()[0], query(top=3))
    assert plain.openings == same.openings == ()


def test_an_older_recording_holds_no_scores(bench: Any, make: Any) -> None:
    teacher, _ = make()
    gather(teacher, query())
    settings = bench.store.teachers()[teacher.fingerprint]
    bench.store.put_teacher(
        teacher.fingerprint, {k: v for k, v in settings.items() if k not in ("score", "topk", "vocabulary")}
    )
    offered = replayed(bench.path).capabilities
    assert (offered.score, offered.topk, offered.vocabulary) == (False, 0, "")


# ---------------------------------------------------------------------- what is promised


@pytest.mark.parametrize(
    ("kind", "settings", "score", "topk"),
    [
        ("vllm", {}, True, 20),
        ("vllm", {"max_logprobs": 64}, True, 64),
        ("vllm", {"tokenizer": None}, False, 0),
        ("sglang", {}, True, 1000),
        ("openai", {"preset": "fireworks"}, True, 5),
        ("openai", {"preset": "openai"}, False, 0),
        ("openai", {"preset": "generic", "base_url": "http://127.0.0.1:9/v1", "tokenizer": None}, False, 0),
        ("llamacpp", {}, False, 0),
        ("ollama", {}, False, 0),
        ("anthropic", {"tokenizer": None}, False, 0),
    ],
)
def test_r18_promises_are_what_the_built_one_offers(
    bench: Any, folders: dict[str, str], kind: str, settings: dict[str, Any], score: bool, topk: int
) -> None:
    built = bench.make(kind, **{"tokenizer": folders["own"], "continuation": "instruct", **settings})
    promised = TEACHERS.get(kind).promises(built._config)
    assert promised == built.capabilities
    assert (promised.score, promised.topk, promised.logits) == (score, topk, False)
    with_tokenizer = settings.get("tokenizer", "own") is not None
    assert promised.vocabulary == (query().vocabulary if with_tokenizer else "")
    # A server returns its own likeliest tokens only: nothing that needs the student's support can be served.
    assert "logits" in missing(frozenset({"logits"}), promised)


def test_promises_need_no_key(folders: dict[str, str]) -> None:
    kind = TEACHERS.get("openai")
    config = kind.Config(model="m", preset="fireworks", tokenizer=folders["own"], api_key_env="NO_SUCH_KEY")
    assert kind.promises(config).score
    with pytest.raises(ConfigError, match="teacher.tokenizer"):
        kind.promises(config.model_copy(update={"tokenizer": "/no/such/folder"}))


def test_a_lossy_tokenizer_is_no_ground_for_scores(bench: Any, folders: dict[str, str], make: Any) -> None:
    teacher, _ = make()
    teacher.backend.chat.vocabulary.lossy = "it drops accents"
    offered = teacher.backend.offers
    assert (offered.score, offered.topk, offered.vocabulary) == (False, 0, query().vocabulary)
    asked = replace(query(), vocabulary="another")
    with pytest.raises(ConfigError, match="^the tokenizer of .* drops accents"):
        gather(teacher, asked)
    (found,) = gather(teacher, query())  # its own ids need no laying over text
    assert found.ends == (None,) * len(found.ids) and len(found.logprobs) == len(found.ids)


def test_a_teacher_that_scores_nothing_says_so(bench: Any, folders: dict[str, str]) -> None:
    for settings in ({}, {"tokenizer": folders["own"]}):
        with pytest.raises(TeacherError, match="given text"):
            gather(bench.make("llamacpp", bench.Script([]), **settings), query())


def routed(bench: Any, *tokenizers: str | None) -> tuple[Any, Any]:
    kind = TEACHERS.get("routed")
    teachers = {
        f"t{number}": {"type": "vllm", "model": f"m{number}", "tokenizer": tokenizer, "max_logprobs": 10 + number}
        for number, tokenizer in enumerate(tokenizers)
    }
    config = kind.Config.model_validate({"type": "routed", "by": "of", "teachers": teachers})
    return kind(config, bench.store), config


def test_several_teachers_offer_what_all_do(bench: Any, folders: dict[str, str]) -> None:
    alike, config = routed(bench, folders["own"], folders["own"])
    assert TEACHERS.get("routed").promises(config) == alike.capabilities
    offered = alike.capabilities
    assert (offered.score, offered.topk, offered.vocabulary) == (True, 10, query().vocabulary)
    mixed, _ = routed(bench, folders["own"], folders["other"])
    assert (mixed.capabilities.score, mixed.capabilities.vocabulary) == (True, "")
    assert routed(bench, folders["own"], None)[0].capabilities == replace(offered, score=False, topk=0, vocabulary="")


def test_each_teacher_of_several_scores_its_own_prompts(bench: Any, folders: dict[str, str]) -> None:
    teacher, _ = routed(bench, folders["own"], folders["other"])
    scripts = [bench.Script(lambda body: bench.Said(body=vllm_says(body))) for _ in range(2)]
    for script, part in zip(scripts, teacher._parts.values(), strict=True):
        part.backend._transport._http = script.mock()

    def asked(name: str, row: int) -> ScoreQuery:
        messages: Sequence[Message] = tiny.prompt().messages
        return replace(query(row=row), prompt=Prompt("p", tuple(messages), extras={"of": name}))

    found = gather(teacher, asked("t1", 0), asked("t0", 1))
    assert [one.teacher for one in found] == ["t1", "t0"]
    assert found[1].ids == query().ids != found[0].ids
    assert [script.calls for script in scripts] == [1, 1]
