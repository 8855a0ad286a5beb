"""Whole answers in the store: what a second epoch of a text-only method finds there."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from omniopd.types import Answers, Reply


def ask(bench: Any, script: Any, **changes: Any) -> Answers:
    (found,) = asyncio.run(bench.teacher(script).gather([replace(bench.answer_query(n=4), **changes)]))
    assert isinstance(found, Answers)
    return found


def test_samples_differ_refusals_are_asked_again_and_cut_answers_are_never_used(bench: Any) -> None:
    refusal = "I'm sorry, but I can't help with that."
    choices = [
        bench.choice("It is 42."),
        bench.choice("42, then."),
        bench.choice(refusal),
        bench.choice("It", "length"),
    ]
    script = bench.Script([bench.Said(body={"choices": choices}), bench.say("Six times seven is 42.")])
    first, second = ask(bench, script), ask(bench, script, row=3)

    assert first.replies == (Reply("It is 42.", "stop"), Reply("42, then.", "stop"))
    assert first.rejected == {"refusal": 1, "cut": 1}
    assert second.replies == (*first.replies, Reply("Six times seven is 42.", "stop")), "only the refused one is new"
    assert second.rejected == {"cut": 1}
    assert [body.get("n", 1) for body in script.bodies] == [4, 1]
    assert bench.store.stats().answers == 3 and bench.store.stats().rejected == {"cut": 1}


def test_the_key_of_a_draw_holds_its_repeat_index_and_not_its_row(bench: Any) -> None:
    manner = bench.teacher(bench.Script([bench.say("x")])).manner
    keys = manner.ask(bench.answer_query(n=4)).keys(4)
    assert len(set(keys)) == 4
    assert manner.ask(bench.answer_query(n=4, row=9)).keys(4) == keys
    assert not set(keys) & set(manner.ask(bench.answer_query(n=4, seed=8)).keys(4))
