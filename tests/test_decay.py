"""The decay probe: what is asked, and how the curve runs from the teacher's accuracy to the student's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from omniopd.decay import Decay, decay_curve, decay_queries
from omniopd.types import Continuations, Prompt, Reply, Rollout

TEXTS = ["First, we add the two numbers. That makes 19.", "Then we divide by three. Tom has 7 apples."]


@pytest.fixture(scope="module")
def rows(llama_folder: Path) -> list[Rollout]:
    student = tiny.policy(llama_folder)
    written = [tiny.rollout(student, student.encode(text)[0]) for text in TEXTS]
    return [*written, tiny.rollout(student, student.encode(" 19")[0])]


def right(prompt: Prompt, text: str) -> bool | None:
    return None if "?" in text else "19" in text


def test_each_rollout_is_gone_on_from_at_each_cut_that_is_inside_it(rows: list[Rollout]) -> None:
    queries = decay_queries(rows, [0, 5, 1000], 40, 0)
    assert [(q.chunk.start, q.row) for q in queries] == [(0, 0), (0, 1), (0, 2), (5, 0), (5, 1)]
    assert all(q.n == 1 and q.max_tokens == 40 and TEXTS[q.row].startswith(q.chunk.prefix) for q in queries[3:])
    assert {q.chunk.prefix for q in queries[:3]} == {""}
    assert len({q.seed for q in queries}) == len(queries)
    assert decay_queries(rows, [0], 40, 1)[0].seed != queries[0].seed


def test_the_curve_runs_from_the_teachers_accuracy_to_the_students(rows: list[Rollout]) -> None:
    """The teacher is right until it has read five tokens; of the student's own two texts of three are right."""
    cuts = [0, 5, 1000]
    queries = decay_queries(rows, cuts, 40, 0)
    found = [Continuations(q, (Reply(" 19" if q.chunk.start == 0 else " 8", "stop"),)) for q in queries]
    curve = decay_curve(rows, cuts, found, right)
    assert [row.accuracy for row in curve] == pytest.approx([1, 1 / 3, 2 / 3])
    assert [(row.continued, row.whole, row.unknown) for row in curve] == [(3, 0, 0), (2, 1, 0), (0, 3, 0)]
    whole = [replace(rows[0], text="19 at last")]
    ended = Continuations(decay_queries(rows, [5], 40, 0)[0], (Reply(" 19", "length"),))
    assert decay_curve(whole, [5], [ended], lambda prompt, text: text == ended.query.chunk.prefix + " 19") == [
        Decay(5, 1.0, 1, 0, 0)
    ]


def test_what_nobody_could_judge_is_no_mistake(rows: list[Rollout]) -> None:
    queries = decay_queries(rows, [0], 40, 0)
    found = [
        Continuations(queries[0], (), {"empty": 1}),
        Continuations(queries[1], (Reply("What?", "stop"),)),
        Continuations(queries[2], (Reply(" 19", "stop"),)),
    ]
    assert decay_curve(rows, [0], found, right) == [Decay(0, 1.0, continued=2, whole=0, unknown=2)]
    assert decay_curve(rows, [0], found[:2], right) == [Decay(0, None, continued=1, whole=0, unknown=3)]
    assert decay_curve([], [0], [], right) == [Decay(0, None, 0, 0, 0)]
