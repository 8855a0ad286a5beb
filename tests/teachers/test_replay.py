"""A replay repeats the recorded run: the same replies, the same holes, and no network."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from omniopd.errors import ConfigError, StoreError
from omniopd.registry import TEACHERS
from omniopd.store import Store
from omniopd.types import Usage
from teachers import ladder
from teachers.replay import ReplayConfig, ReplayTeacher


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


@pytest.mark.parametrize("rung", ["prefill", "instruct", "auto"])
def test_the_same_evidence_as_recorded(bench: Any, rung: str) -> None:
    echo = ladder.echo_of(bench.PREFIX)
    texts = [echo + " 30", " thirty", "", "I'm sorry, but I can't help with that.", bench.PREFIX[:60]]

    def answer(body: Any) -> Any:
        if body["seed"] == 3:
            return bench.Said(500, {})
        return bench.say(*texts[: body.get("n", 1)], finish="length" if body["seed"] == 2 else "stop")

    live = bench.teacher(bench.Script(answer), continuation=rung, system="Be exact.", temperature=0.7, max_attempts=2)
    queries = [
        *(bench.continue_query(row=seed, seed=seed, n=5) for seed in (1, 2, 3)),
        bench.continue_query(prefix="", row=4, seed=4),
        bench.answer_query(row=5, seed=2),
    ]
    recorded = gather(live, *queries)
    replay = ReplayTeacher(ReplayConfig(path=str(bench.path)))
    heard: list[tuple[int, int]] = []
    repeated = asyncio.run(replay.gather(queries, lambda *done: heard.append(done)))
    assert replay.fingerprint == live.fingerprint
    assert replay.capabilities == live.capabilities
    assert recorded[2].rejected == {"error": 5}
    assert [(e.query, e.replies, e.rejected) for e in repeated] == [(e.query, e.replies, e.rejected) for e in recorded]
    assert all(e.usage == Usage(cached_calls=1) for e in repeated)
    assert heard == [(done, 5) for done in (1, 2, 3, 4, 5)]
    asyncio.run(replay.close())


def test_a_missing_draw_is_named_with_the_mend(bench: Any) -> None:
    query = bench.continue_query()
    gather(bench.teacher(bench.Script([bench.say(*"abcd")])), query)
    replay = ReplayTeacher(ReplayConfig(path=str(bench.path)))
    with pytest.raises(StoreError, match=r"draw 5 of 6 .*prompt 'p', rollout 0, chunk at token 10.*record anew"):
        gather(replay, replace(query, n=6))
    with pytest.raises(StoreError, match="whole answer"):
        gather(replay, bench.answer_query())


def test_a_recording_of_whole_answers_only(bench: Any) -> None:
    live = bench.teacher(bench.Script([bench.say("42", "6*7=42")]), continuation="auto")
    (recorded,) = gather(live, bench.answer_query())
    (repeated,) = gather(ReplayTeacher(ReplayConfig(path=str(bench.path))), bench.answer_query())
    assert repeated.replies == recorded.replies


def test_several_teachers_in_one_store(bench: Any) -> None:
    script = bench.Script([bench.say(*"abcd")])
    for model in ("one", "two"):
        gather(bench.teacher(script, model=model), bench.continue_query())
    with pytest.raises(ConfigError, match=r"teacher\.fingerprint: .*several"):
        ReplayTeacher(ReplayConfig(path=str(bench.path)))
    with pytest.raises(ConfigError, match="known: "):
        ReplayTeacher(ReplayConfig(path=str(bench.path), fingerprint="three"))
    chosen = bench.teacher(script, model="two").fingerprint
    (evidence,) = gather(ReplayTeacher(ReplayConfig(path=str(bench.path), fingerprint=chosen)), bench.continue_query())
    assert len(evidence.replies) == 4


def test_files_that_hold_no_recording(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TEACHERS.get("replay") is ReplayTeacher
    with pytest.raises(StoreError, match="no such file"):
        ReplayTeacher(ReplayConfig(path=str(bench.path) + "x"))
    with pytest.raises(StoreError, match="holds no recorded teacher"):
        ReplayTeacher(ReplayConfig(path=str(bench.path)))
    Store(bench.path).put_teacher("f", {"rung": "prefill"})
    with pytest.raises(StoreError, match="lacks its"):
        ReplayTeacher(ReplayConfig(path=str(bench.path)))


def test_another_version_of_the_instruction_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    echo = ladder.echo_of(bench.PREFIX)
    live = bench.teacher(bench.Script([bench.say(echo + " 30")]), continuation="instruct")
    gather(live, bench.continue_query(n=1))
    monkeypatch.setattr(ladder, "TEMPLATE_VERSION", 99)
    with pytest.raises(StoreError, match="version 1 of the instruction"):
        ReplayTeacher(ReplayConfig(path=str(bench.path)))
