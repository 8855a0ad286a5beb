"""ALM on the student's own text: numbers on tokens that are the gradient of the chunk loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from scored_by import scored
from torch import Tensor

from omniopd.alignment import AlignedChunk, align_scores
from omniopd.losses.alm import alm_loss
from omniopd.methods.alm import Alm, AlmConfig, words
from omniopd.types import Rollout, TokenScores
from omniopd.vocabulary import Spelling
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

TEXTS = ["The answer is 12 + 7 = 19, so Tom has 19 apples.", "naïve café, then return x  # done"]


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


@pytest.fixture(scope="module")
def teachers(tiny_folder: Callable[..., Path]) -> list[Policy]:
    """Of another tokenizer."""
    return [tiny.policy(tiny_folder("pieces", seed=seed)) for seed in (1, 2)]


def method_of(student: Policy, **config: Any) -> Alm:
    return Alm(AlmConfig(**config), student, 0)


def rows_of(student: Policy) -> list[Rollout]:
    ids = [student.encode(text)[0] for text in TEXTS]
    return [tiny.rollout(student, [*ids[0], student.end_id], finish="stop"), tiny.rollout(student, ids[1])]


def asked(student: Policy, teacher: Policy, rows: Sequence[Rollout]) -> list[TokenScores]:
    return [scored(teacher, query) for query in method_of(student, openings=0).audit(rows, 1)]


def gradient_of(student: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_the_updates_gradient_is_that_of_the_chunk_loss(student: Policy, teachers: list[Policy], tau: float) -> None:
    """The slow reference differentiates the loss through the student's log-probs; the mean is over tokens."""
    rows = rows_of(student)
    evidence = asked(student, teachers[0], rows)
    signal = (method := method_of(student, tau=tau)).read(rows, evidence, 1)
    Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)
    ours = gradient_of(student)
    student.model.zero_grad()
    total, tokens, chunks = torch.zeros(()), 0, 0
    for row, found in zip(rows, evidence, strict=True):
        logits = student.model(input_ids=torch.tensor([[*row.prompt_ids, *row.ids]])).logits[0]
        logp = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        for chunk in align_scores(row, found, student.vocabulary).chunks:
            own = logp[chunk.start : chunk.end].sum().double()
            theirs = torch.tensor(sum(found.logprobs[chunk.teacher_start : chunk.teacher_end]), dtype=torch.float64)
            total = total + alm_loss(own[None], theirs[None], tau)[0]
            tokens += chunk.end - chunk.start
            chunks += 1
    (total / tokens).backward()
    torch.testing.assert_close(ours, gradient_of(student), rtol=1e-3, atol=1e-5)
    assert signal.stats["alm_loss"] == pytest.approx(total.item() / chunks, rel=1e-4)


def test_golden_value_of_a_chunk(student: Policy) -> None:
    """a = 0.5, b = 1.2 over two of the student's tokens and one of the teacher's."""
    ids = [student.tokenizer.convert_tokens_to_ids(piece) for piece in ("he", "re")]
    row = replace(tiny.rollout(student, ids), logprobs=(-0.4, -0.8))
    method = method_of(student)
    vocabulary: Any = SimpleNamespace(digest="other")
    found = TokenScores(method.query(row, 0), (7,), (4,), (-0.5,), vocabulary=vocabulary)
    signal = method.read([row], [found], 1)
    slope = (math.exp(-0.005) - math.exp(-0.012)) / (1 - math.exp(-0.012))
    assert signal.values_BT[0].tolist() == pytest.approx([slope, slope], rel=1e-6)
    assert signal.stats["alm_loss"] == pytest.approx(0.261610, abs=6e-7)


def test_eight_1_a_student_that_is_its_own_teacher_does_not_move(student: Policy) -> None:
    rows = rows_of(student)
    signal = method_of(student).read(rows, asked(student, student, rows), 1)
    assert signal.coverage == 1
    assert all(values.abs().max() < 1e-4 for values in signal.values_BT)


def test_o6_r17_another_teacher_gives_another_loss_and_another_gradient(
    student: Policy, teachers: list[Policy]
) -> None:
    found = []
    for teacher in teachers:
        rows, method = rows_of(student), method_of(student)
        signal = method.read(rows, asked(student, teacher, rows), 1)
        loss = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)["loss"]
        found.append((loss, gradient_of(student)))
    (one, first), (other, second) = found
    assert one != pytest.approx(other, rel=1e-2)
    assert (first - second).norm() > 0.05 * first.norm() > 0


def test_r10_a_log_prob_that_is_no_number_costs_its_chunk_only(student: Policy, teachers: list[Policy]) -> None:
    rows = rows_of(student)
    whole = asked(student, teachers[0], rows)
    bad = [replace(whole[0], logprobs=(*whole[0].logprobs[:3], math.nan, *whole[0].logprobs[4:])), whole[1]]
    before, after = (method_of(student).read(rows, evidence, 1) for evidence in (whole, bad))
    lost = before.mask_BT[0] & ~after.mask_BT[0]
    assert after.rejects["missing"] == int(lost.sum()) > 0
    assert torch.equal(before.values_BT[0][after.mask_BT[0]], after.values_BT[0][after.mask_BT[0]])
    assert torch.equal(before.values_BT[1], after.values_BT[1])


# ------------------------------------------------------------------ words


def spelled(*pieces: str) -> Spelling:
    ends = tuple(len("".join(pieces[: i + 1]).encode()) for i in range(len(pieces)))
    return Spelling("".join(pieces), tuple(range(len(pieces))), ends, (False,) * len(pieces))


def test_chunks_merge_up_to_the_next_space() -> None:
    spelling = spelled("The", " ans", "wer", " ", "is", ".", "")
    single = [AlignedChunk(t, t + 1, 2 * t, 2 * t + 2) for t in range(7)]
    merged = words(single, spelling)
    assert [(chunk.start, chunk.end) for chunk in merged] == [(0, 1), (1, 3), (3, 6), (6, 7)]
    assert [(chunk.teacher_start, chunk.teacher_end) for chunk in merged] == [(0, 2), (2, 6), (6, 12), (12, 14)]


def test_words_do_not_reach_over_a_hole() -> None:
    spelling = spelled(" a", "b", "c", "d")
    chunks = [AlignedChunk(0, 1, 0, 1), AlignedChunk(2, 3, 2, 3), AlignedChunk(3, 4, 3, 4)]
    assert [(chunk.start, chunk.end) for chunk in words(chunks, spelling)] == [(0, 1), (2, 4)]


def test_words_cover_the_same_tokens_with_fewer_chunks(student: Policy, teachers: list[Policy]) -> None:
    rows = rows_of(student)
    evidence = asked(student, teachers[0], rows)
    minimal, merged = (method_of(student, chunks=kind).read(rows, evidence, 1) for kind in ("minimal", "words"))
    assert all(torch.equal(a, b) for a, b in zip(minimal.mask_BT, merged.mask_BT, strict=True))
    ((tokens, values),) = [(student.tokenizer.convert_ids_to_tokens(list(rows[0].ids)), merged.values_BT[0].tolist())]
    opens = [t for t, token in enumerate(tokens) if token.startswith("Ġ")] + [len(tokens) - 1]
    for start, end in zip([0, *opens], [*opens, len(tokens)], strict=True):
        assert len(set(values[start:end])) <= 1
    assert len(set(values)) < len(set(minimal.values_BT[0].tolist()))
