"""DPCA: chunk advantages between two tokenizers, where they land, and what a hole costs."""

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

from omniopd.alignment import align_scores
from omniopd.boundary import byte_scores
from omniopd.credit import Credit
from omniopd.methods.alm import Alm, AlmConfig
from omniopd.methods.dpca import Dpca, DpcaConfig
from omniopd.types import Capabilities, Rollout, ScoreQuery, Signal, TokenScores
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

TEXTS = [
    "The answer is 12 + 7 = 19, so Tom has 19 apples.\nFirst, we add 東京 and 😀👍🏽 the two numbers.",
    "naïve café, then return x  # done",
    "sixty miles every hour",
]


@pytest.fixture(scope="module", params=[("byte_level", "pieces"), ("pieces", "byte_level")], ids="-".join)
def pair(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> tuple[Policy, Policy]:
    """A student and a teacher of another tokenizer."""
    one, other = request.param
    return tiny.policy(tiny_folder(one)), tiny.policy(tiny_folder(other, seed=1))


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def rows_of(student: Policy, texts: Sequence[str] = TEXTS) -> list[Rollout]:
    """Responses that end, but for the last one."""
    ids = [student.encode(text)[0] for text in texts]
    ended = [tiny.rollout(student, [*part, student.end_id], finish="stop") for part in ids[:-1]]
    return [*ended, tiny.rollout(student, ids[-1])]


def method_of(student: Policy, **config: Any) -> Dpca:
    return Dpca(DpcaConfig(**config), student, 0)


def read(student: Policy, rows: Sequence[Rollout], evidence: Sequence[TokenScores], **config: Any) -> Signal:
    return method_of(student, **config).read(rows, evidence, 1)


def asked(student: Policy, teacher: Policy, rows: Sequence[Rollout], openings: int = 0) -> list[TokenScores]:
    return [scored(teacher, query) for query in method_of(student, openings=openings).audit(rows, 1)]


def by_hand(
    student: Policy, pieces: Sequence[str], own: Sequence[float], ends: Sequence[int], teacher: Sequence[float]
):
    """A response of given tokens and log-probs, and a teacher's tokens that end at those bytes."""
    ids = [student.tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    row = replace(tiny.rollout(student, ids), logprobs=tuple(own))
    query = method_of(student).query(row, 0)
    other = SimpleNamespace(digest="other")
    found = TokenScores(query, tuple(range(len(ends))), tuple(ends), tuple(teacher), vocabulary=other)  # type: ignore[arg-type]
    return [row], [found]


# ------------------------------------------------------------------ golden numbers


@pytest.mark.parametrize(("credit", "golden"), [("share", [0.25, 0.75]), ("uniform", [0.5, 0.5]), ("full", [1.0, 1.0])])
def test_golden_credit(llama: Policy, credit: Credit, golden: list[float]) -> None:
    """The student spells "here" as he|re, the teacher as h|er|e: one chunk."""
    rows, evidence = by_hand(llama, ["he", "re"], (-0.5, -1.5), (1, 3, 4), (-0.3, -0.4, -0.3))
    signal = read(llama, rows, evidence, credit=credit)
    assert signal.values_BT[0].tolist() == pytest.approx(golden, abs=1e-6)
    assert signal.stats["reverse_kl_k1"] == pytest.approx(-0.5)
    assert (signal.stats["aligned_share"], signal.stats["one_to_one_share"], signal.stats["largest_chunk"]) == (1, 0, 3)


def test_golden_clamp_breaks_conservation_and_is_counted(llama: Policy) -> None:
    rows, evidence = by_hand(llama, ["he", "re"], (-0.5, -1.5), (1, 4), (-10.0, -20.0))
    free, held = (read(llama, rows, evidence, clamp=limit) for limit in (None, 10.0))
    assert free.values_BT[0].tolist() == pytest.approx([-7, -21])
    assert "clamped_share" not in free.stats
    assert held.values_BT[0].tolist() == pytest.approx([-7, -10])
    assert held.stats["clamped_share"] == 0.5


@pytest.mark.parametrize(("limit", "holes"), [(3, {}), (2, {"too_long": 2})])
def test_a_chunk_of_too_many_tokens_is_a_counted_hole(llama: Policy, limit: int, holes: dict[str, int]) -> None:
    rows, evidence = by_hand(llama, ["he", "re", "n"], (-0.5, -1.5, -1.0), (1, 3, 4, 5), (-0.3, -0.4, -0.3, -2.0))
    signal = read(llama, rows, evidence, max_chunk_tokens=limit)
    assert signal.rejects == holes
    assert signal.values_BT[0][2] == pytest.approx(-1)


@pytest.mark.parametrize(("bad", "reason"), [(math.nan, "missing"), (-math.inf, "infinite")])
def test_r10_a_log_prob_that_is_no_number_costs_its_chunk_only(llama: Policy, bad: float, reason: str) -> None:
    rows, evidence = by_hand(llama, ["he", "re", "n"], (-0.5, -1.5, -1.0), (1, 3, 4, 5), (-0.3, bad, -0.3, -2.0))
    signal = read(llama, rows, evidence)
    assert signal.rejects == {reason: 2}
    assert signal.mask_BT[0].tolist() == [False, False, True]
    assert signal.values_BT[0].tolist() == [0, 0, -1]


# ------------------------------------------------------------------ two tokenizers


@pytest.mark.parametrize("credit", ["share", "uniform"])
def test_advantages_of_a_chunk_add_up_to_its_log_ratio(pair: tuple[Policy, Policy], credit: Credit) -> None:
    student, teacher = pair
    rows = rows_of(student)
    evidence = asked(student, teacher, rows)
    signal = read(student, rows, evidence, credit=credit)
    chunks = 0
    for row, found, values in zip(rows, evidence, signal.values_BT, strict=True):
        for chunk in align_scores(row, found, student.vocabulary).chunks:
            own = sum(row.logprobs[chunk.start : chunk.end])
            theirs = sum(found.logprobs[chunk.teacher_start : chunk.teacher_end])
            assert values[chunk.start : chunk.end].sum().item() == pytest.approx(theirs - own, abs=1e-5)
            chunks += chunk.end - chunk.start > 1
    assert chunks >= 5


def test_with_openings_every_token_has_a_number_of_its_own(pair: tuple[Policy, Policy]) -> None:
    """They add up to the response's log-ratio, too, and are shared out otherwise than by `share`."""
    student, teacher = pair
    rows = rows_of(student)
    evidence = asked(student, teacher, rows, openings=20)
    signal, shared = (read(student, rows, evidence, credit=credit) for credit in ("bytes", "share"))
    assert signal.rejects == shared.rejects == {}
    apart = 0
    for row, found, values, other in zip(rows, evidence, signal.values_BT, shared.values_BT, strict=True):
        worth = byte_scores(student.vocabulary.spell(row.ids).ends, found, closes=row.finish == "stop")
        assert values.tolist() == pytest.approx([u - p for u, p in zip(worth, row.logprobs, strict=True)], abs=1e-5)
        assert values.sum().item() == pytest.approx(other.sum().item(), abs=1e-4)
        apart += not torch.allclose(values, other)
        if row.finish == "stop":
            assert values.sum().item() == pytest.approx(sum(found.logprobs) - sum(row.logprobs), abs=1e-4)
    assert apart


def test_eight_4_a_canary_lands_on_the_tokens_that_spell_its_bytes(pair: tuple[Policy, Policy]) -> None:
    """The teacher's log-prob of a token is minus the bytes up to its end: a chunk's value tells where it stands."""
    student, teacher = pair
    rows = [replace(row, logprobs=tuple([-1e-9] * len(row))) for row in rows_of(student)]
    evidence = [
        replace(found, logprobs=tuple(-float(end) if end is not None else math.nan for end in found.ends))
        for found in asked(student, teacher, rows)
    ]
    signal = read(student, rows, evidence, credit="full", max_chunk_tokens=1)
    single = 0
    for row, values, mask in zip(rows, signal.values_BT, signal.mask_BT, strict=True):
        ends = student.vocabulary.spell(row.ids).ends
        for t in mask.nonzero()[:, 0].tolist():
            assert values[t].item() == pytest.approx(-ends[t])  # type: ignore[operator]
            single += 1
    assert single > 20


def test_o13_the_end_of_the_turn_goes_to_the_end_of_the_turn(pair: tuple[Policy, Policy]) -> None:
    student, teacher = pair
    rows = rows_of(student)
    evidence = asked(student, teacher, rows)
    signal = read(student, rows, evidence)
    for row, found, values, mask in zip(rows, evidence, signal.values_BT, signal.mask_BT, strict=True):
        if row.finish == "stop":
            assert mask[-1]
            assert values[-1].item() == pytest.approx(found.logprobs[-1] - row.logprobs[-1], abs=1e-6)
            assert found.ids[-1] == teacher.end_id


def test_what_follows_a_chunk_changes_nothing_in_it(pair: tuple[Policy, Policy]) -> None:
    student, teacher = pair
    short, long = rows_of(student, ["The answer is 19, so", "The answer is 19, so Tom has 19 apples.", ""])[:2]
    before, after = (read(student, [row], asked(student, teacher, [row])).values_BT[0] for row in (short, long))
    shared = next(t for t, (a, b) in enumerate(zip(short.ids, long.ids, strict=False)) if a != b)
    assert shared > 5
    torch.testing.assert_close(before[: shared - 1], after[: shared - 1], rtol=1e-3, atol=1e-4)


def test_x5_tokens_without_a_counterpart_count_as_unsupervised(pair: tuple[Policy, Policy]) -> None:
    student, teacher = pair
    rows = rows_of(student)
    signal = read(student, rows, asked(student, teacher, rows), max_chunk_tokens=1)
    heard = sum(int(mask.sum()) for mask in signal.mask_BT)
    assert 0 < signal.coverage < 1
    assert heard + signal.rejects.total() == sum(map(len, rows))
    assert signal.stats["aligned_share"] == pytest.approx(signal.coverage)


def test_x1_x4_half_a_character_at_the_end_costs_no_more_than_itself(pair: tuple[Policy, Policy]) -> None:
    student, teacher = pair
    smile = student.encode("so Tom has 😀")[0]
    row = tiny.rollout(student, smile[:-1])
    signal = read(student, [row], asked(student, teacher, [row]))
    whole = len(student.encode("so Tom has ")[0])
    assert signal.mask_BT[0].nonzero()[:, 0].tolist() == list(range(whole))
    assert signal.rejects == {"broken": len(row) - whole}


def test_r4_ids_that_the_text_would_not_be_cut_into_are_aligned_by_bytes(llama: Policy, tiny_folder: Any) -> None:
    """A student that spells "then" letter by letter, a teacher that does not: still one text."""
    teacher = tiny.policy(tiny_folder("pieces", seed=1))
    ids = [llama.tokenizer.convert_tokens_to_ids(letter) for letter in "then"]
    row = tiny.rollout(llama, ids)
    signal = read(llama, [row], asked(llama, teacher, [row]))
    assert signal.coverage == 1


def test_eight_1_a_student_that_is_its_own_teacher_has_no_advantage_anywhere(llama: Policy) -> None:
    rows = rows_of(llama)
    signal = read(llama, rows, asked(llama, llama, rows))
    assert signal.coverage == 1
    assert all(values.abs().max() < 1e-5 for values in signal.values_BT)
    assert signal.stats["one_to_one_share"] == 1


def gradient_of(student: Policy, teacher: Policy) -> tuple[float, Tensor]:
    rows, method = rows_of(student), method_of(student)
    signal = method.read(rows, asked(student, teacher, rows), 1)
    terms = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)
    return terms["loss"], torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])


def test_o6_r17_another_teacher_gives_another_loss_and_another_gradient(llama: Policy, tiny_folder: Any) -> None:
    teachers = [tiny.policy(tiny_folder("pieces", seed=seed)) for seed in (1, 2)]
    one, other = (gradient_of(llama, teacher) for teacher in teachers)
    assert one[0] != pytest.approx(other[0], rel=1e-2)
    assert (one[1] - other[1]).norm() > 0.1 * one[1].norm() > 0


# ------------------------------------------------------------------ what it needs


@pytest.mark.parametrize("method", [Dpca(DpcaConfig(), SimpleNamespace(), 0), Alm(AlmConfig(), SimpleNamespace(), 0)])  # type: ignore[arg-type]
def test_any_tokenizer_will_do_unless_the_students_cannot_be_laid_over_text(method: Any) -> None:
    plain = SimpleNamespace(digest="one", lossy="")
    lossy = SimpleNamespace(digest="one", lossy="it writes capitals as small letters")
    other, own = (Capabilities(score=True, topk=20, vocabulary=name) for name in ("two", "one"))
    for vocabulary, offered, lacking in [
        (plain, other, 0),
        (plain, own, 0),
        (lossy, own, 0),
        (lossy, other, 1),
        (plain, Capabilities(vocabulary="one"), 1),
        (plain, replace(other, topk=5), 1),
    ]:
        method.text = SimpleNamespace(vocabulary=vocabulary)
        assert len(method.lacking(offered)) == lacking
    assert "capitals" in _said(method, lossy, other)


def _said(method: Any, vocabulary: Any, offered: Capabilities) -> str:
    method.text = SimpleNamespace(vocabulary=vocabulary)
    (said,) = method.lacking(offered)
    return str(said)


@pytest.mark.parametrize("openings", [0, 20])
def test_it_asks_for_log_probs_and_what_openings_need(llama: Policy, openings: int) -> None:
    for query in method_of(llama, openings=openings).audit(rows_of(llama), 1):
        assert isinstance(query, ScoreQuery)
        assert (query.top, query.whole) == (openings, False)
