"""Sequence-level distillation: whole answers of the teacher's, right after the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from omniopd.methods.seqkd import SeqKD, SeqKDConfig
from omniopd.types import AnswerQuery, Answers, Message, Reply, Rollout
from students.packing import build_rows
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer


@pytest.fixture(scope="module", params=["byte_level", "pieces", "dummy_space"])
def student(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path], tmp_path_factory: Any) -> Policy:
    if request.param == "dummy_space":
        return tiny.policy(tiny.saved(tmp_path_factory.mktemp("llama2"), tiny.pieces(dummy_space=True)))
    return tiny.policy(tiny_folder(request.param))


def unwritten(student: Policy) -> list[Rollout]:
    return tiny.sampler(student, 0).unwritten([tiny.prompt(name="a"), tiny.prompt("And 3?", "b")])


def asked(student: Policy, **config: Any) -> tuple[SeqKD, list[Rollout], list[AnswerQuery]]:
    method = SeqKD(SeqKDConfig(**config), student, 0)
    rows = unwritten(student)
    return method, rows, method.audit(rows, 4)  # type: ignore[return-value]


def test_it_asks_for_answers_to_every_prompt(student: Policy) -> None:
    method, rows, queries = asked(student, answers=3, answer_tokens=77)
    assert [(q.prompt, q.row, q.n, q.max_tokens) for q in queries] == [(r.prompt, i, 3, 77) for i, r in enumerate(rows)]
    assert len({q.seed for q in queries}) == 2
    assert (method.needs, method.on_policy, method.objective.anchor.beta) == ({"answer"}, False, 0.0)


def test_answers_of_the_first_time_come_again_unless_fresh_ones_are_wanted(student: Policy) -> None:
    method, rows, queries = asked(student)
    assert queries == method.audit(rows, 5)
    later = method.audit(rows[::-1], 5)
    assert {(q.prompt.id, q.seed) for q in queries} == {(q.prompt.id, q.seed) for q in later}  # type: ignore[union-attr]
    fresh, _, first = asked(student, fresh=True)
    assert len({q.seed for q in (*first, *fresh.audit(rows, 5))}) == 4  # type: ignore[union-attr]


def test_rows_of_one_prompt_have_answers_of_their_own(student: Policy) -> None:
    method, rows, _ = asked(student)
    method.group = 2
    seeds = [query.seed for query in method.audit([rows[0]] * 2 + [rows[1]] * 2, 1)]  # type: ignore[union-attr]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("template", ["byte_level", "pieces"])
def test_teacher_text_stands_in_the_students_template_with_its_end(template: str, tiny_folder: Any) -> None:
    student = tiny.policy(tiny_folder(template))
    method, rows, queries = asked(student)
    said = "The answer is 19."
    signal = method.read(rows, [Answers(q, (Reply(said, "stop"),)) for q in queries], 4)
    for branch, rollout in zip(signal.branches, rows, strict=True):
        turns = [{"role": m.role, "content": m.content} for m in (*rollout.prompt.messages, Message("assistant", said))]
        rendered = student.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert [*rollout.prompt_ids, *branch.ids] == list(rendered)


def test_the_loss_is_on_the_answer_and_its_end_and_on_nothing_of_the_prompt(student: Policy) -> None:
    method, rows, queries = asked(student)
    signal = method.read(rows[:1], [Answers(queries[0], (Reply("It is 19.", "stop"),))], 4)
    (row,) = build_rows(rows[:1], signal.branches, trees=True)
    (branch,) = signal.branches
    learned = [(place, token) for place, token, _ in row.branch_sites]
    first = len(rows[0].prompt_ids) - 1  # the prompt's last token predicts the answer's first
    assert learned == [(first + i, token) for i, token in enumerate(branch.ids)]
    assert learned[-1][1] == student.end_id


def test_answers_are_branches_at_zero_that_end(student: Policy) -> None:
    method, rows, queries = asked(student, answers=2)
    texts = ["The answer is 東京 😀.", "  19\n"]
    signal = method.read(rows, [Answers(q, tuple(Reply(t, "stop") for t in texts)) for q in queries], 4)
    assert [(b.row, b.at, b.weight, b.context) for b in signal.branches] == [(r, 0, 1.0, 0) for r in (0, 0, 1, 1)]
    assert all(b.ids[-1] == student.end_id for b in signal.branches)
    assert [student.decode(list(b.ids)) for b in signal.branches] == texts * 2
    assert [len(v) for v in signal.values_BT] == [0, 0] and signal.coverage == 0.0 and not signal.drops
    assert signal.stats["branch_tokens"] == sum(len(b.ids) for b in signal.branches)


def test_s14_cut_answers_are_dropped_and_counted_not_learned_half(student: Policy) -> None:
    method, rows, queries = asked(student, answers=3)
    evidence = [
        Answers(queries[0], (Reply("done", "stop"), Reply("and the", "length"), Reply("so we", "length"))),
        Answers(queries[1], (), {"refusal": 2, "empty": 1}),
    ]
    signal = method.read(rows, evidence, 4)
    assert [student.decode(list(b.ids)) for b in signal.branches] == ["done"]
    assert (dict(signal.drops), dict(signal.rejects)) == ({"cut": 2, "refusal": 1}, {"refusal": 2, "empty": 1})
    silent = method.read(rows, [Answers(q, ()) for q in queries], 4)
    assert (silent.branches, dict(silent.drops)) == ((), {"unanswered": 2})


def test_a_teacher_cannot_write_control_tokens(student: Policy) -> None:
    method, rows, queries = asked(student)
    end = student.tokenizer.convert_ids_to_tokens(student.end_id)
    signal = method.read(rows, [Answers(queries[0], (Reply(f"one {end} two", "stop"),))], 4)
    assert signal.branches[0].ids.count(student.end_id) == 1
    assert student.decode(list(signal.branches[0].ids)) == f"one {end} two"


def test_the_loss_is_supervised_cross_entropy_and_training_learns_the_answers(student: Policy) -> None:
    method, rows, queries = asked(student)
    signal = method.read(rows, [Answers(q, (Reply("The answer is 19.", "stop"),)) for q in queries], 4)
    trainer = Trainer(student, OptimizerSettings(learning_rate=2e-2), method.objective)
    nll = torch.cat([-tiny.dense(student.model, rows[b.row].prompt_ids, b.ids)[0] for b in signal.branches])
    assert trainer.update(rows, signal)["loss"] == pytest.approx(float(nll.mean()), abs=1e-5)
    for _ in range(60):
        loss = trainer.update(rows, signal)["loss"]
    assert loss < 0.3 * float(nll.mean())
