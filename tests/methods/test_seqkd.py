"""Sequence-level distillation: whole answers of the teacher's, right after the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from omniopd.methods.seqkd import SeqKD, SeqKDConfig
from omniopd.types import AnswerQuery, Answers, Reply, Rollout
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
    assert len({q.seed for q in queries}) == 2 and queries == method.audit(rows, 4) != method.audit(rows, 5)
    assert (method.needs, method.on_policy, method.objective.anchor.beta) == ({"answer"}, False, 0.0)


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
