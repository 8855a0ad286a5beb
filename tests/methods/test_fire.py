"""FiRe: which rollouts are dropped over the whole step, what their tokens weigh, and where either number comes from."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from scored_by import scored, scores_of
from torch import Tensor

from omniopd.composition import compose
from omniopd.draft import Draft
from omniopd.measures import entropies_of_top
from omniopd.method import Method
from omniopd.parts.entropy_weights import TEACHER, entropy_weights
from omniopd.parts.trajectory_filter import least_kept
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import Capabilities, Evidence, Rollout, Signal, TokenScores
from students.batches import micro_batches
from students.packing import build_rows
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView

FILTER = {"name": "trajectory_filter"}
WEIGHTS = {"name": "entropy_weights"}
MEANS = (-0.1, -0.2, -0.3, -0.4, -0.5)  # the sheet's mean log-probs


def built(student: Policy, *parts: dict[str, Any], control: str = "none") -> Method:
    config = {"name": "fire", "control": control, **({"parts": list(parts)} if parts else {})}
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)


def rows_of(student: Policy, lengths: Sequence[int] = (9, 4, 6, 5)) -> list[Rollout]:
    torch.manual_seed(4)
    return [tiny.rollout(student, torch.randint(5, 200, (length,)).tolist()) for length in lengths]


def means_of(method: Method, rows: Sequence[Rollout], means: Sequence[float]) -> list[TokenScores]:
    """Scores of these means: they go up and down around it, but for an odd last token."""

    def logprob(row: int, t: int) -> float:
        odd = t == len(rows[row]) - 1 and t % 2 == 0
        return means[row] + (0.0 if odd else 0.01 * (-1) ** t)

    return scores_of(method.audit(rows, 1), logprob)


def filtered(
    student: Policy, means: Sequence[float], drop: float = 0.2, control: str = "none", step: int = 1
) -> list[int]:
    """The rows that are dropped of rollouts of these mean log-probs, but for an empty one at the end."""
    method = built(student, FILTER | {"drop": drop}, control=control)
    rows = rows_of(student, [*(2 + row % 3 for row in range(len(means))), 0])
    signal = method.read(rows, means_of(method, rows, means), step)
    return dropped(signal)


def dropped(signal: Signal) -> list[int]:
    return [row for row, mask in enumerate(signal.mask_BT) if len(mask) and not bool(mask.any())]


def entropies(teacher: Policy, row: Rollout) -> Tensor:
    return tiny.dense(teacher.model, row.prompt_ids, row.ids)[1].double()


def heard(
    student: Policy, teacher: Policy, method: Method, rows: list[Rollout]
) -> tuple[list[Rollout], list[Evidence]]:
    """The rollouts with what is measured of them, and the evidence."""
    evidence: list[Evidence] = [scored(teacher, query) for query in method.audit(rows, 1)]
    facts = method.measure(dict(enumerate(rows)), evidence, StudentView(student, rows))
    measured = {row: {name: tuple(numbers) for name, numbers in own.items()} for row, own in facts.items()}
    return [replace(one, facts=measured.get(row, {})) for row, one in enumerate(rows)], evidence


# ------------------------------------------------------------------ the filter


def test_the_sheets_threshold_drops_the_last_only(student: Policy) -> None:
    assert least_kept(MEANS, 0.2) == pytest.approx(-0.42)
    assert filtered(student, MEANS) == [4]
    assert filtered(student, MEANS[::-1]) == [0]


def test_ties_at_the_threshold_are_kept(student: Policy) -> None:
    assert filtered(student, [-0.5, -0.1, -0.5, -0.5, -0.5], drop=0.5) == []
    assert filtered(student, [-0.5, -0.1, -0.9, -0.5], drop=0.34) == [2]


@pytest.mark.parametrize("means", [(0.0, -1.0, -2.0), (-2.0, -1.0, 0.0)])
def test_a_rollouts_length_has_no_say(student: Policy, means: tuple[float, ...]) -> None:
    """The first with its tokens twice over has the same mean."""
    rows = rows_of(student, [4, 4, 4])
    double = replace(rows[0], ids=rows[0].ids * 2, logprobs=rows[0].logprobs * 2, entropy=rows[0].entropy * 2)
    method, numbers = built(student, FILTER | {"drop": 0.4}), [-0.25, -0.75, -0.5, -1.0]
    signals = [
        method.read(some, scores_of(method.audit(some, 1), lambda row, t: means[row] + numbers[t % 4]), 1)
        for some in (rows, [double, *rows[1:]])
    ]
    assert [dropped(signal) for signal in signals] == [[means.index(-2.0)]] * 2
    assert signals[0].stats["filter_threshold"] == signals[1].stats["filter_threshold"]


def test_one_rollout_is_kept_but_not_without_a_word(student: Policy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert filtered(student, MEANS) == [4]
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert filtered(student, [-3.0]) == []
    assert "step 1: trajectory_filter drops nothing of one rollout; raise train.prompts_per_step" in caplog.text


def test_several_teachers_have_a_threshold_each(student: Policy, caplog: pytest.LogCaptureFixture) -> None:
    method = built(student, FILTER | {"drop": 0.4})
    rows = rows_of(student, [2] * 7)
    scores = means_of(method, rows, [-1.0, -2.0, -3.0, -0.1, -0.2, -0.3, -9.0])
    names = ["blunt"] * 3 + ["mild"] * 3 + ["lone"]
    with caplog.at_level(logging.WARNING):
        signal = method.read(rows, [replace(one, teacher=name) for one, name in zip(scores, names, strict=True)], 1)
    assert dropped(signal) == [2, 5]
    assert signal.stats["filter_threshold"] is None
    assert "drops nothing of one rollout of teacher lone" in caplog.text
    assert dropped(method.read(rows, scores, 1)) == [1, 2, 6]  # of one teacher


@pytest.mark.parametrize("count", [3, 4, 7])
def test_what_the_teacher_rules_out_goes_first(student: Policy, count: int) -> None:
    assert least_kept([-math.inf, -0.1, -0.2], 0.2) == -0.2
    assert least_kept([-math.inf, -math.inf, -0.2], 0.2) == -math.inf
    method, rows = built(student, FILTER), rows_of(student, [3] * count)
    scores = scores_of(method.audit(rows, 1), lambda row, t: -math.inf if row == t == 0 else -0.2 + row / 10)
    assert dropped(method.read(rows, scores, 1)) == ([0] if count < 7 else [0, 1])


def test_what_the_teacher_left_out_is_no_reason_to_drop(student: Policy) -> None:
    """A rollout of which another signal speaks; and one hole moves no mean."""
    rows = rows_of(student, [2, 2, 2])
    (part,) = built(student, FILTER | {"drop": 0.5}).parts  # type: ignore[attr-defined]
    logprobs = {0: math.nan, 1: -1.0, 2: -2.0}
    scores = scores_of(built(student).audit(rows, 1), lambda row, t: math.nan if row == 2 and t else logprobs[row])
    signal = Signal(tuple(torch.ones(2) for _ in rows), tuple(torch.ones(2, dtype=torch.bool) for _ in rows))
    draft = Draft.of(signal, rows, scores, 1, lambda _: None)
    part.apply(draft)
    assert dropped(draft.finish()) == [2]


def test_its_control_drops_as_many_at_random(student: Policy) -> None:
    found = [filtered(student, MEANS, drop=0.5, control="shuffled", step=step) for step in range(1, 9)]
    assert {len(rows) for rows in found} == {2}
    assert len({tuple(rows) for rows in found}) > 2


# ------------------------------------------------------------------ the weights


def test_the_sheets_weights() -> None:
    teacher, student = (torch.tensor(side, dtype=torch.float64) for side in ([0, 1, 2], [0.5, 1, 0]))
    weights = entropy_weights(teacher, student, torch.ones(3, dtype=torch.bool), 1.0, 1.0)
    assert weights.tolist() == pytest.approx([1.285714, 1.285714, 0.428571], abs=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.0, 2.0), (3.0, 0.5), (4.0, 0.0)])
def test_weights_have_mean_one_and_bounded_ratios(alpha: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        teacher, student = torch.rand(2, 40, generator=generator, dtype=torch.float64).pow(4).unbind()
        mask = torch.rand(40, generator=generator) < 0.7
        weights = entropy_weights(teacher, student, mask, alpha, beta)
        learned = weights[mask]
        assert float(learned.mean()) == pytest.approx(1, abs=1e-6)
        assert 1 < float(learned.max() / learned.min()) <= (1 + alpha) * (1 + beta) + 1e-9
        assert bool((weights[~mask] == 1).all())
        moved = entropy_weights(teacher.where(mask, 9.0), student.where(mask, 9.0), mask, alpha, beta)
        assert torch.equal(moved, weights)  # what is not learned has no say


def test_rollouts_without_any_entropy_weigh_one() -> None:
    nothing, mask = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    assert entropy_weights(nothing, nothing, mask, 1.0, 1.0).tolist() == [1, 1, 1]
    doubt = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    # c = 1 and k = 0, constants that the mean takes out again: the other side alone weighs
    assert entropy_weights(nothing, doubt, mask, 1.0, 1.0).tolist() == pytest.approx([1 / 1.5, 1.0, 2 / 1.5])
    assert entropy_weights(doubt, nothing, mask, 1.0, 1.0).tolist() == pytest.approx([2 / 1.5, 1.0, 1 / 1.5])


@pytest.mark.parametrize("alpha", [0.3, 1.0, 7.0])
def test_a_teacher_of_constant_doubt_is_plain_to_the_last_bit(student: Policy, alpha: float) -> None:
    rows = [replace(row, facts={TEACHER: (0.7,) * len(row)}) for row in rows_of(student)]
    method = built(student, WEIGHTS | {"alpha": alpha, "beta": 0})
    plain = built(student, WEIGHTS | {"alpha": 0, "beta": 0})
    signals = [one.read(rows, scores_of(one.audit(rows, 1), lambda row, t: -1.0 - t), 1) for one in (method, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*(signal.values_BT for signal in signals), strict=True))
    assert signals[0].stats["weight_max"] == 1


def test_entropy_of_the_likeliest_and_a_bucket_never_exceeds_the_whole() -> None:
    q = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05], dtype=torch.float64)
    (found,) = entropies_of_top([dict(enumerate(q.log().tolist()[:3]))]).tolist()
    assert found == pytest.approx(1.319545, abs=1e-6)
    assert float(-(q * q.log()).sum()) == pytest.approx(1.583275, abs=1e-6)
    torch.manual_seed(0)
    for logp in torch.randn(50, 12, dtype=torch.float64).mul(3).log_softmax(-1):
        top = logp.sort(descending=True).values.tolist()
        bounds = entropies_of_top([dict(enumerate(top[:k])) for k in range(1, 13)])
        assert bool((bounds.diff() >= -1e-12).all())  # the more, the closer
        assert float(bounds[-1]) == pytest.approx(-float((logp.exp() * logp).sum()))


@pytest.mark.parametrize("k", [0, 8])
def test_weights_are_of_both_sides_entropies_at_each_token(student: Policy, teacher: Policy, k: int) -> None:
    method = built(student, WEIGHTS | {"k": k})
    rows, evidence = heard(student, teacher, method, rows_of(student, [9, 0, 6]))
    signal = method.read(rows, evidence, 1)
    plain = compose(METHODS.get("opd").Config(), student, 0).read(rows, evidence, 1)
    for row in (0, 2):
        theirs, own = entropies(teacher, rows[row]), entropies(student, rows[row])
        if k:
            lower = torch.tensor(rows[row].facts[TEACHER], dtype=torch.float64)
            assert bool((lower < theirs).all())
            theirs = lower
        raw = (2 - theirs / theirs.max()) * (1 + own / own.max())
        expected = plain.values_BT[row] * (raw / raw.mean()).float()
        torch.testing.assert_close(signal.values_BT[row], expected, rtol=1e-4, atol=1e-6)
        assert not signal.values_BT[row].requires_grad
    assert signal.stats["approximate"] == (1.0 if k else None)


def test_a_dropped_rollout_moves_no_weight_of_another(student: Policy, teacher: Policy) -> None:
    """The released mean runs over the tokens of rollouts that are dropped afterwards."""
    method = built(student)
    rows, evidence = heard(student, teacher, method, rows_of(student))
    (gone,) = dropped(signal := method.read(rows, evidence, 1))
    other = replace(
        rows[gone], entropy=tuple(9.0 + h for h in rows[gone].entropy), facts={TEACHER: (5.0,) * len(rows[gone])}
    )
    again = method.read([*rows[:gone], other, *rows[gone + 1 :]], evidence, 1)
    assert all(torch.equal(a, b) for a, b in zip(signal.values_BT, again.values_BT, strict=True))
    assert signal.stats["weight_mean"] == pytest.approx(1)


def test_their_control_has_the_same_weights_at_other_places(student: Policy, teacher: Policy) -> None:
    method, shuffled = built(student, WEIGHTS), built(student, WEIGHTS, control="shuffled")
    rows, evidence = heard(student, teacher, method, rows_of(student))
    plain = compose(METHODS.get("opd").Config(), student, 0).read(rows, evidence, 1)
    weights = [
        [
            (values / base).tolist()
            for values, base in zip(one.read(rows, evidence, 1).values_BT, plain.values_BT, strict=True)
        ]
        for one in (method, shuffled)
    ]
    for real, dealt in zip(*weights, strict=True):
        assert sorted(real) == pytest.approx(sorted(dealt), rel=1e-5) and real != pytest.approx(dealt)


# ------------------------------------------------------------------ both


def test_micro_batches_of_one_two_and_four_rollouts_keep_and_learn_the_same(
    teacher: Policy, llama_folder: Path
) -> None:
    """The released code takes threshold, maxima and mean inside the micro-batch."""
    found = []
    for tokens, count in ((1, 4), (50, 2), (1000, 1)):
        student = tiny.policy(llama_folder, micro_batch_tokens=tokens)
        rows = rows_of(student)
        packed = micro_batches(build_rows(rows, [], trees=True), tokens, forests=True, hidden=student.hidden_size)
        assert len(list(packed)) == count
        method = built(student)
        rows, evidence = heard(student, teacher, method, rows)
        signal = method.read(rows, evidence, 1)
        assert len(dropped(signal)) == 1
        loss = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)["loss"]
        found.append((dropped(signal), loss, [p.grad for p in student.model.parameters()]))
    (kept, loss, gradient), *others = found
    for other in others:
        assert other[0] == kept
        assert other[1] == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(other[2], gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_mean_over_the_tokens_that_are_kept(student: Policy, teacher: Policy) -> None:
    method = built(student)
    rows, evidence = heard(student, teacher, method, rows_of(student))
    signal = method.read(rows, evidence, 1)
    loss = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)["loss"]
    kept = [row for row in range(4) if row not in dropped(signal)]
    terms = torch.cat([-signal.values_BT[row] * torch.tensor(rows[row].logprobs) for row in kept])
    assert loss == pytest.approx(float(terms.sum()) / sum(len(rows[row]) for row in kept), rel=1e-4)


def test_the_published_settings_are_the_defaults(student: Policy) -> None:
    first, second = (part.config for part in built(student).parts)  # type: ignore[attr-defined]
    assert (first.drop, second.alpha, second.beta) == (0.2, 1, 1)


@pytest.mark.parametrize(
    ("parts", "lacks"),
    [
        ((FILTER,), ""),
        ((FILTER, WEIGHTS | {"alpha": 0}), ""),  # the student's doubt alone
        ((WEIGHTS | {"k": 20},), ""),
        ((WEIGHTS | {"k": 21},), "the 21 likeliest tokens of given text (it has 20: lower k of method.parts"),
        ((FILTER, WEIGHTS), "logits"),
    ],
)
def test_each_part_asks_the_teacher_for_what_it_reads(
    student: Policy, parts: tuple[dict[str, Any], ...], lacks: str
) -> None:
    server = Capabilities(score=True, topk=20, vocabulary=student.vocabulary.digest)
    found = built(student, *parts).lacking(server)
    assert len(found) == bool(lacks) and all(one.startswith(lacks) for one in found)
    assert built(student, *parts).lacking(replace(server, score=False, topk=0))
