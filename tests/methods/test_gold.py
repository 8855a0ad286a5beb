"""GOLD: groups between families, its part of equal tokens, and that the student comes to follow the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from between_families import DEMO, built, demo_rows, divergences, evidence_of, learns, read, rows_of, shifted, taught

from omniopd.alignment import align_scores
from omniopd.targets.gold import GroupTarget
from omniopd.types import Capabilities
from students.policy import Policy


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


@pytest.fixture(scope="module")
def teacher(tiny_folder: Callable[..., Path]) -> Policy:
    """SentencePiece, where the student is byte-level."""
    return tiny.policy(tiny_folder("pieces", "llama", seed=3))


@pytest.fixture(scope="module")
def sibling(tiny_folder: Callable[..., Path]) -> Policy:
    """The student's tokenizer, other weights."""
    return tiny.policy(tiny_folder(seed=1))


def test_a_group_speaks_at_its_last_token(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    method = built(student, name="gold")
    evidence = evidence_of(method, teacher, rows)
    signal = method.read(rows, evidence, 1)
    chunks = [align_scores(row, found, student.vocabulary).chunks for row, found in zip(rows, evidence, strict=True)]
    for own, mask, target in zip(chunks, signal.mask_BT, signal.targets, strict=True):
        assert isinstance(target, GroupTarget)
        assert mask.nonzero()[:, 0].tolist() == [chunk.end - 1 for chunk in own]
        assert list(target.blocks) == [(chunk.start, chunk.end) for chunk in own]
    grouped = sum(chunk.end - chunk.start - 1 for own in chunks for chunk in own)
    assert signal.rejects["grouped"] == grouped > 0
    assert sum(signal.rejects.values()) == sum(int((~mask).sum()) for mask in signal.mask_BT)
    assert signal.stats["aligned_share"] == pytest.approx(
        sum(chunk.end - chunk.start for own in chunks for chunk in own) / sum(map(len, rows))
    )
    assert signal.mask_BT[0][-1]  # the end of the turn, by role
    assert divergences(student, rows, signal).isfinite().all()


def test_equal_tokens_of_two_families_are_paired_by_bytes(student: Policy, teacher: Policy) -> None:
    """With all the weight on them, a teacher that is sure of a word with a space before it asks for that word."""
    rows = rows_of(student)
    (target, *_) = read(student, teacher, rows, name="gold", matched_weight=1.0).targets
    assert isinstance(target, GroupTarget)
    theirs, ours = target.words.matched.tolist()
    spelled = dict(zip(ours, theirs, strict=True))
    word = student.vocabulary.bytes_of.index(b" the")
    assert teacher.vocabulary.bytes_of[spelled[word]] == b" the"
    assert spelled[student.end_id] == teacher.end_id


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_neutral_with_one_tokenizer_is_the_generalised_jsd_to_the_last_bit(
    student: Policy, sibling: Policy, beta: float
) -> None:
    rows = rows_of(student)
    loss, gradients = taught(student, sibling, rows, name="gold", beta=beta)
    expected, of_plain = taught(student, sibling, rows, name="opd", form="dense", divergence="jsd", beta=beta)
    assert loss == expected != 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_plain, strict=True))


def test_with_one_tokenizer_groups_say_the_same_as_the_shortcut(student: Policy, sibling: Policy) -> None:
    """All the weight on equal tokens is what the vocabularies' overlap gives; only the floor of 1e-8 is between the two."""
    rows = rows_of(student)
    short = read(student, sibling, rows, name="gold")
    long = read(student, sibling, rows, name="gold", matched_weight=1.0)
    assert isinstance(long.targets[0], GroupTarget)
    assert not isinstance(short.targets[0], GroupTarget)
    torch.testing.assert_close(
        divergences(student, rows, long), divergences(student, rows, short), atol=1e-6, rtol=1e-4
    )


def test_a_self_teacher_gives_zero_and_a_shifted_one_does_not(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student, name="gold", matched_weight=0.5)
    evidence = evidence_of(method, student, rows)
    assert divergences(student, rows, method.read(rows, evidence, 1)).abs().max() < 1e-6
    late = method.read(rows, [shifted(found) for found in evidence], 1)
    assert divergences(student, rows, late).median() > 0.05


def test_the_student_comes_to_follow_the_teacher(student: Policy, teacher: Policy) -> None:
    losses = learns(student, teacher, rows_of(student), 25, name="gold")
    assert losses[-1] < 0.7 * losses[0]


def test_what_it_needs_and_warns_of(student: Policy) -> None:
    method = built(student, name="gold")
    assert method.lacking(Capabilities(score=True, logits=True)) == []
    assert method.lacking(Capabilities(score=True, topk=100)) == ["logits"]
    assert "baseline" in method.cautions()[0]
    assert method.min_coverage == 0.3


def test_the_demo_models_agree_better_in_place_than_a_token_late() -> None:
    student, teacher = (tiny.policy(DEMO / side) for side in ("student", "teacher"))
    rows = demo_rows(student)
    method = built(student, name="gold")
    evidence = evidence_of(method, teacher, rows)
    signal = method.read(rows, evidence, 1)
    assert signal.coverage > 0.9
    near = divergences(student, rows, signal).mean()
    late = divergences(student, rows, method.read(rows, [shifted(found) for found in evidence], 1)).mean()
    assert late > 5 * near
