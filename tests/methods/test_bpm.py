"""BPM: settings, what is asked, where it speaks, and that the student comes to follow a teacher of another tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from between_families import DEMO, built, demo_rows, divergences, evidence_of, learns, read, rows_of, shifted, taught
from tokenizers import normalizers

from omniopd.targets.bpm import BytePrefixTarget
from omniopd.types import Capabilities, ScoreQuery
from omniopd.vocabulary import Vocabulary
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


def test_it_asks_for_whole_distributions(student: Policy) -> None:
    queries = built(student, name="bpm").audit(rows_of(student), 1)
    assert all(isinstance(q, ScoreQuery) and q.whole and q.top == 0 for q in queries)
    assert len(queries) == 3


def test_it_speaks_nearly_everywhere_and_says_where_not(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    signal = read(student, teacher, rows, name="bpm")
    assert signal.coverage > 0.8
    silent = sum(int((~mask).sum()) for mask in signal.mask_BT)
    assert sum(signal.rejects.values()) == silent > 0
    assert set(signal.rejects) <= {"blank", "too_long", "broken"}
    assert not signal.drops
    assert 0.5 < (signal.stats["exact_share"] or 0) <= 1
    assert 0 < (signal.stats["shorter_share"] or 0) < 0.5
    assert signal.stats["reverse_kl_k1"] is not None
    assert divergences(student, rows, signal).isfinite().all()
    assert divergences(student, rows, signal).min() > 0


def test_blanks_are_masked_unless_wanted(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    blank = [[b"".strip() == student.vocabulary.bytes_of[id].strip(b" \t") for id in row.ids] for row in rows]
    masked = read(student, teacher, rows, name="bpm")
    whole = read(student, teacher, rows, name="bpm", mask_blanks=False)
    assert masked.rejects["blank"] > 0
    assert whole.rejects["blank"] == 0
    for row, blanks, with_, without in zip(rows, blank, masked.mask_BT, whole.mask_BT, strict=True):
        for t, id in enumerate(row.ids):
            is_blank = blanks[t] and id != student.end_id  # the end of the turn spells nothing, and is none
            assert bool(with_[t]) == (bool(without[t]) and not is_blank)


def test_the_end_of_the_turn_maps_by_role(student: Policy, teacher: Policy) -> None:
    """At every boundary, the teacher's probability of its own end is the student's target for its own end."""
    rows = rows_of(student)
    method = built(student, name="bpm", boundary=False)
    evidence = evidence_of(method, teacher, rows)
    signal = method.read(rows, evidence, 1)
    for row, found, target in zip(rows, evidence, signal.targets, strict=True):
        assert isinstance(target, BytePrefixTarget)
        assert found.distributions is not None
        q = found.distributions.head(found.distributions.hidden).softmax(-1)
        at = [place for place in target.places if place is not None and not place.spelled]
        mass, *_ = target.mapped(at, torch.zeros(1, student.vocabulary.size))
        expected = q[[place.row for place in at], teacher.end_id]
        torch.testing.assert_close(mass[:, student.end_id], expected)
        assert len(at) > len(row) / 2
    assert signal.mask_BT[0][-1]


def test_the_target_at_each_place_against_loops_over_the_vocabulary(student: Policy, teacher: Policy) -> None:
    """Real tokenizers of two families: every teacher token is tried against every student token."""
    rows = rows_of(student)[1:2]
    method = built(student, name="bpm", boundary=False)
    (found,) = evidence_of(method, teacher, rows)
    (target,) = method.read(rows, [found], 1).targets
    assert isinstance(target, BytePrefixTarget)
    assert found.distributions is not None
    q = found.distributions.head(found.distributions.hidden).detach().double().softmax(-1)
    ours, theirs = student.vocabulary.bytes_of, teacher.vocabulary.bytes_of
    there = [place for place in target.places if place is not None]
    assert any(place.spelled for place in there)
    mass, residual, _ = target.mapped(there[:25], torch.zeros(1, len(ours)))
    for place, row, rest in zip(there[:25], mass, residual, strict=True):
        slow, lost = torch.zeros(len(ours), dtype=torch.float64), 0.0
        for id, word in enumerate(theirs):
            if not word.startswith(place.spelled):
                continue
            fits = [(len(s), u) for u, s in enumerate(ours) if s and word[len(place.spelled) :].startswith(s)]
            if id == teacher.end_id and not place.spelled:
                slow[student.end_id] += q[place.row, id]
            elif fits:
                slow[max(fits)[1]] += q[place.row, id]
            else:
                lost += float(q[place.row, id])
        total = float(slow.sum()) + lost
        torch.testing.assert_close(row.double(), slow / total, atol=1e-7, rtol=1e-5)
        assert float(rest) == pytest.approx(lost / total, abs=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_neutral_with_one_tokenizer_is_dense_distillation_to_the_last_bit(
    student: Policy, sibling: Policy, kind: str
) -> None:
    rows = rows_of(student)
    loss, gradients = taught(student, sibling, rows, name="bpm", divergence=kind, mask_blanks=False)
    expected, of_plain = taught(student, sibling, rows, name="opd", form="dense", divergence=kind)
    assert loss == expected != 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_plain, strict=True))


def test_a_self_teacher_gives_zero_and_a_shifted_one_does_not(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student, name="bpm")
    evidence = evidence_of(method, student, rows)
    assert divergences(student, rows, method.read(rows, evidence, 1)).abs().max() < 1e-6
    late = method.read(rows, [shifted(found) for found in evidence], 1)
    assert divergences(student, rows, late).median() > 0.1


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_the_student_comes_to_follow_the_teacher(student: Policy, teacher: Policy, kind: str) -> None:
    losses = learns(student, teacher, rows_of(student), 25, name="bpm", divergence=kind)
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] > 0


def test_r10_a_missing_log_prob_silences_its_chunk_only(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    method = built(student, name="bpm", mask_blanks=False)
    evidence = evidence_of(method, teacher, rows)
    before = method.read(rows, evidence, 1)
    gone = (*evidence[0].logprobs[:3], math.nan, *evidence[0].logprobs[4:])
    after = method.read(rows, [replace(evidence[0], logprobs=gone), *evidence[1:]], 1)
    lost = int(before.mask_BT[0].sum()) - int(after.mask_BT[0].sum())
    assert lost == after.rejects["missing"] - before.rejects["missing"] > 0
    assert lost <= 6
    assert divergences(student, rows, after).isfinite().all()


def test_scores_without_distributions_are_holes(student: Policy, teacher: Policy) -> None:
    """As in a replay, or where a teacher gives log-probs only."""
    rows = rows_of(student)
    method = built(student, name="bpm")
    evidence = [replace(found, distributions=None) for found in evidence_of(method, teacher, rows)]
    signal = method.read(rows, evidence, 1)
    assert signal.coverage == 0
    assert signal.drops == {"missing": 3}


def test_one_vocabulary_but_other_ids_are_holes(student: Policy, sibling: Policy) -> None:
    rows = rows_of(student)
    method = built(student, name="bpm")
    evidence = [replace(found, ids=found.ids[::-1]) for found in evidence_of(method, sibling, rows)]
    assert method.read(rows, evidence, 1).drops == {"retokenized": 3}


def test_a_space_that_the_teacher_puts_before_a_text_costs_one_chunk(
    student: Policy, tiny_folder: Callable[..., Path]
) -> None:
    """Its first token spells a space that the text does not have; read as it is, the student would learn that space."""
    spaced = tiny.saved(tiny_folder().parent / "spaced", tiny.pieces(dummy_space=True))
    signal = read(student, tiny.policy(spaced), rows_of(student), name="bpm", mask_blanks=False)
    assert 3 <= signal.rejects["spelling"] <= 3 * 6
    assert [bool(mask[0]) for mask in signal.mask_BT] == [False] * 3
    assert signal.coverage > 0.7


def test_what_it_needs(student: Policy) -> None:
    logits = Capabilities(score=True, logits=True, topk=9, vocabulary="another")
    assert built(student, name="bpm").lacking(logits) == []
    assert built(student, name="bpm").lacking(replace(logits, logits=False)) == ["logits"]
    reverse = built(student, name="bpm", divergence="reverse")
    assert "method.divergence=reverse" in reverse.lacking(logits)[0]
    assert reverse.lacking(replace(logits, vocabulary=student.vocabulary.digest)) == []


def test_a_lossy_student_is_refused(student: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.byte_level()
    lowered = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    monkeypatch.setattr(student, "vocabulary", Vocabulary(lowered))
    (lacking,) = built(student, name="bpm").lacking(Capabilities(score=True, logits=True))
    assert "normaliser" in lacking


def test_cautions(student: Policy) -> None:
    assert built(student, name="bpm").cautions() == []
    (said,) = built(student, name="bpm", mask_blanks=False).cautions()
    assert "method.mask_blanks" in said


def test_the_demo_models_agree_better_in_place_than_a_token_late() -> None:
    """Trained models of two families: the canary on real rows."""
    student, teacher = (tiny.policy(DEMO / side) for side in ("student", "teacher"))
    rows = demo_rows(student)
    method = built(student, name="bpm")
    evidence = evidence_of(method, teacher, rows)
    signal = method.read(rows, evidence, 1)
    assert signal.coverage > 0.7
    assert (signal.stats["exact_share"] or 0) > 0.9
    near = divergences(student, rows, signal).mean()
    late = divergences(student, rows, method.read(rows, [shifted(found) for found in evidence], 1)).mean()
    assert late > 5 * near
