"""ULD: positions by index, the option of a cross-entropy, and what its sorted probabilities can't tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from between_families import DEMO, built, demo_rows, divergences, evidence_of, learns, read, rows_of, shifted, taught

from omniopd.types import Capabilities, Distributions
from students.policy import Policy


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


@pytest.fixture(scope="module")
def teacher(tiny_folder: Callable[..., Path]) -> Policy:
    """SentencePiece, where the student is byte-level."""
    return tiny.policy(tiny_folder("pieces", "llama", seed=3))


def test_position_by_position_as_far_as_the_shorter_side_goes(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    method = built(student, name="uld")
    evidence = evidence_of(method, teacher, rows)
    cut = evidence[0].ids[:7]
    assert len(cut) < len(rows[0])
    short = replace(evidence[0], ids=cut, ends=evidence[0].ends[:7], logprobs=evidence[0].logprobs[:7])
    given = evidence[0].distributions
    assert given is not None
    short = replace(short, distributions=Distributions(given.hidden[:7], given.head))
    signal = method.read(rows, [short, *evidence[1:]], 1)
    assert signal.mask_BT[0].tolist() == [True] * 7 + [False] * (len(rows[0]) - 7)
    assert signal.rejects["beyond"] >= len(rows[0]) - 7
    assert sum(signal.rejects.values()) == sum(int((~mask).sum()) for mask in signal.mask_BT)
    assert divergences(student, rows, signal).isfinite().all()


def test_r10_a_missing_log_prob_is_a_hole(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    method = built(student, name="uld")
    evidence = evidence_of(method, teacher, rows)
    gone = (*evidence[0].logprobs[:3], math.nan, *evidence[0].logprobs[4:])
    signal = method.read(rows, [replace(evidence[0], logprobs=gone), *evidence[1:]], 1)
    assert signal.rejects["missing"] == 1
    assert not signal.mask_BT[0][3]
    assert signal.mask_BT[0][4]


def test_the_weight_is_that_of_the_l1(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    found = {
        weight: divergences(student, rows, read(student, teacher, rows, name="uld", weight=weight)) for weight in (1, 3)
    }
    torch.testing.assert_close(found[3], 3 * found[1])
    released = divergences(student, rows, read(student, teacher, rows, name="uld"))
    torch.testing.assert_close(released, 1.5 * found[1])


def test_a_cross_entropy_adds_the_students_own_likelihood(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    plain, _ = taught(student, teacher, rows, name="uld")
    both, _ = taught(student, teacher, rows, name="uld", cross_entropy=0.5)
    mask = torch.cat(read(student, teacher, rows, name="uld").mask_BT)
    own = torch.cat([torch.tensor(row.logprobs) for row in rows])
    assert both - plain == pytest.approx(-0.5 * float(own[mask].mean()), rel=1e-4)


def test_a_self_teacher_gives_zero(student: Policy) -> None:
    rows = rows_of(student)
    assert divergences(student, rows, read(student, student, rows, name="uld")).abs().max() < 1e-6


def test_the_student_comes_to_be_as_sure_as_the_teacher(student: Policy, teacher: Policy) -> None:
    losses = learns(student, teacher, rows_of(student), 25, name="uld")
    assert losses[-1] < 0.5 * losses[0]


def test_it_hardly_sees_that_a_teacher_is_a_token_late() -> None:
    """Why it is a baseline: on trained models of two families, rows in the wrong place cost next to nothing more."""
    student, teacher = (tiny.policy(DEMO / side) for side in ("student", "teacher"))
    rows = demo_rows(student)
    method = built(student, name="uld")
    evidence = evidence_of(method, teacher, rows)
    near, late = (
        divergences(student, rows, method.read(rows, found, 1)).mean()
        for found in (evidence, [shifted(one) for one in evidence])
    )
    assert 0.5 < late / near < 2


def test_what_it_needs_and_warns_of(student: Policy) -> None:
    method = built(student, name="uld")
    assert method.lacking(Capabilities(score=True, logits=True)) == []
    assert method.lacking(Capabilities(score=True, topk=100)) == ["logits"]
    assert "baseline" in method.cautions()[0]
    assert len(method.cautions()) == 1
    assert "method.cross_entropy=1" in built(student, name="uld", cross_entropy=1).cautions()[1]
