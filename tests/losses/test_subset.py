"""Divergences on a few ids: the sheets' golden numbers, gradients, fixed points, and what happens to holes."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from toy import STUDENT, TEACHER, P, Q, finite_differences, trained, value_and_gradient

from omniopd.losses import Divergence
from omniopd.losses.subset import Mode, SubsetStats, common, full_divergence, subset_divergence

S = torch.tensor([0, 1])
LOGQ = TEACHER.log_softmax(0)
MODES: tuple[Mode, ...] = get_args(Mode)
KINDS: tuple[Divergence, ...] = get_args(Divergence)
MASS_GRADIENT = [0.129413, 0.047608, -0.096751, -0.058682, -0.021588]  # of M_p


def loss(
    mode: Mode, kind: Divergence = "reverse", ids: Tensor = S, teacher: Tensor = TEACHER, at: Tensor = STUDENT
) -> tuple[Tensor, Tensor]:
    return value_and_gradient(
        lambda x: subset_divergence(x, ids, teacher.log_softmax(-1)[..., ids], mode, kind, 0.5)[0], at
    )


def stats_of(logits: Tensor, ids: Tensor, logq: Tensor, mode: Mode) -> SubsetStats:
    return subset_divergence(logits, ids, logq, mode)[1]


@pytest.mark.parametrize(
    ("mode", "kind", "value", "gradient"),
    [
        ("tail_bucket", "reverse", 0.5726264868, [0.532277, -0.321996, -0.114929, -0.069708, -0.025644]),
        ("tail_bucket", "jsd", 0.1210515657, [0.108297, -0.074282, -0.018591, -0.011276, -0.004148]),
        ("partial", "reverse", 0.6512867449, [0.617403, -0.290680, -0.178570, -0.108308, -0.039844]),
        ("partial_sg", "reverse", 0.6512867449, [0.487990, -0.338288, -0.081819, -0.049626, -0.018256]),
        ("renorm", "reverse", 0.7157980370, [0.49153, -0.49153, 0, 0, 0]),
    ],
)
def test_golden_values_and_gradients(mode: Mode, kind: Divergence, value: float, gradient: list[float]) -> None:
    found, slope = loss(mode, kind)
    assert found.item() == pytest.approx(value, abs=5e-11)
    assert slope.tolist() == pytest.approx(gradient, abs=6e-6 if mode == "renorm" else 6e-7)


def test_golden_masses_of_the_support_and_of_its_tail() -> None:
    stats = stats_of(STUDENT, S, LOGQ[S], "tail_bucket")
    masses = torch.stack([stats.student_mass, stats.teacher_mass])
    assert masses.tolist() == pytest.approx([0.770145, 0.676349], abs=6e-7)
    assert (1 - masses).tolist() == pytest.approx([0.229855, 0.323651], abs=6e-7)


def slow(logits: Tensor, mode: Mode, kind: Divergence, ids: list[int], teacher: Tensor = TEACHER) -> Tensor:
    """The definitions with probabilities, one position; the detached weight has no say in the value."""
    p, q = logits.softmax(0)[ids], teacher.softmax(0)[ids]
    if mode == "tail_bucket":
        p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
    elif mode == "renorm":
        p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    return {
        "reverse": (p * (p / q).log()).sum(),
        "forward": (q * (q / p).log()).sum(),
        "jsd": 0.5 * (q * (q / m).log()).sum() + 0.5 * (p * (p / m).log()).sum(),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", [[3], [0, 1], [4, 2, 0]])
def test_o15_every_mode_and_divergence_is_its_definition(mode: Mode, kind: Divergence, ids: list[int]) -> None:
    found, gradient = loss(mode, kind, torch.tensor(ids))
    assert found.item() == pytest.approx(slow(STUDENT, mode, kind, ids).item(), abs=1e-13)
    if (mode, kind) != ("partial_sg", "reverse"):
        assert torch.allclose(gradient, finite_differences(lambda at: slow(at, mode, kind, ids), STUDENT), atol=1e-8)


def test_partial_is_partial_sg_and_the_gradient_of_the_mass() -> None:
    """Many Faces 1: `grad(partial) - grad(partial_sg) = grad(M_p)`, there even where the teacher is the student."""
    mass = value_and_gradient(lambda at: at.softmax(0)[S].sum(), STUDENT)
    assert mass[0].item() == pytest.approx(0.7701451679, abs=5e-11)
    assert mass[1].tolist() == pytest.approx(MASS_GRADIENT, abs=6e-7)
    (value, bare), (same, held) = loss("partial"), loss("partial_sg")
    assert value.item() == same.item()  # a value test can't tell the two apart
    assert torch.allclose(bare - held, mass[1], atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_o4_teacher_equals_student_teaches_nothing_in_any_mode_but_partial(mode: Mode, kind: Divergence) -> None:
    """Many Faces 2. Both sides are normalised over the same set; `partial` documents its defect."""
    value, gradient = loss(mode, kind, teacher=STUDENT)
    assert value.item() == pytest.approx(0, abs=0 if kind != "jsd" else 1e-15)
    if (mode, kind) == ("partial", "reverse"):
        assert gradient.tolist() == pytest.approx(MASS_GRADIENT, abs=6e-7)
    elif mode.startswith("partial") and kind == "forward":
        expected = (P * P[S].sum()).index_add(0, S, -P[S])  # - sum_S q grad log p: mass is drawn into S
        assert torch.allclose(gradient, expected, atol=1e-14)
    else:
        assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_o2_no_value_is_without_a_gradient(mode: Mode, kind: Divergence) -> None:
    """Random teachers and students, one to all ids: what is not 0 moves something."""
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 6):
        ids = torch.randperm(5, generator=generator)[:size]
        teacher, student = (3 * torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)).unbind()
        logq = teacher.log_softmax(-1)[:, ids]
        value, gradient = value_and_gradient(
            lambda at, ids=ids, logq=logq: subset_divergence(at, ids, logq, mode, kind, 0.5)[0], student
        )
        moved = gradient.norm(dim=-1) > 0
        assert bool((moved | (value.abs() <= 1e-6)).all())
        assert bool(moved.any()) == (mode != "renorm" or size > 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ids_are_the_full_divergence(mode: Mode, kind: Divergence, dtype: torch.dtype) -> None:
    """Many Faces 3: k = V. In fp32, too, where the tail is nothing but rounding."""
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    everything = torch.tensor([3, 1, 4, 0, 2])
    value, gradient = loss(mode, kind, everything, teacher, student)
    truth = value_and_gradient(lambda at: full_divergence(teacher, at, kind, 0.5), student)
    close = 1e-12 if dtype == torch.float64 else 2e-6
    assert value.item() == pytest.approx(truth[0].item(), abs=close)
    assert torch.allclose(gradient, truth[1], atol=close)


def test_no_ids_are_the_distribution_form_bit_for_bit() -> None:
    for kind in KINDS:
        value, stats = subset_divergence(STUDENT, None, TEACHER, "tail_bucket", kind, 0.3)
        assert value.item() == full_divergence(TEACHER, STUDENT, kind, 0.3).item()
        assert (stats.student_mass.item(), stats.teacher_mass.item(), stats.dead.item()) == (1, 1, False)


@pytest.mark.parametrize(
    ("mode", "ratio", "tail"),
    [("partial", 1 / math.e, 0.751185), ("partial_sg", 1.0, 0.323651), ("tail_bucket", 1.0, 0.323651)],
)
def test_a_free_student_trained_to_convergence(mode: Mode, ratio: float, tail: float) -> None:
    """Many Faces 4: p/q on S is .367879 for the bare sum, which drives the mass into the unsupervised tail."""
    p = trained(lambda at: subset_divergence(at, S, LOGQ[S], mode)[0])
    assert (p[S] / Q[S]).tolist() == pytest.approx([ratio, ratio], abs=1e-6)
    assert 1 - p[S].sum().item() == pytest.approx(tail, abs=1e-6)


def test_a_free_student_trained_on_everything_becomes_the_teacher() -> None:
    p = trained(lambda at: subset_divergence(at, None, TEACHER)[0])
    assert torch.allclose(p, Q, atol=1e-9)


def test_two_experts_have_a_floor_that_no_student_beats() -> None:
    """Many Faces 5: the best student of two teachers that it can't tell apart, and the loss that remains."""
    q = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]], dtype=torch.float64)
    for kind, best, floor in (
        ("reverse", [0.447287, 0.447287, 0.105426], 0.7459910),
        ("forward", [0.475, 0.475, 0.05], 0.4626074),
    ):
        logits = torch.zeros(3, dtype=torch.float64)
        for _ in range(500):
            value, slope = value_and_gradient(
                lambda at, kind=kind: full_divergence(q.log(), at.expand(2, 3), kind, 0.5).mean(),
                logits,
            )
            logits = logits - 2 * slope
        assert logits.softmax(0).tolist() == pytest.approx(best, abs=1e-6)
        assert value.item() == pytest.approx(floor, abs=5e-8)


def test_ids_that_both_sides_name() -> None:
    """Many Faces 6: k = 2 leaves one id, which teaches nothing; k = 3 leaves {0, 1}, which is `renorm` there."""
    for k, value, gradient in ((2, 0.0, [0.0] * 5), (3, 0.7157980370, [0.49153, -0.49153, 0, 0, 0])):
        own, other = STUDENT.topk(k).indices, TEACHER.topk(k).indices
        logq = common(own, LOGQ[own], other)
        assert sorted(own[logq.isfinite()].tolist()) == ([1] if k == 2 else [0, 1])
        found = value_and_gradient(
            lambda at, own=own, logq=logq: subset_divergence(at, own, logq, "renorm")[0], STUDENT
        )
        assert found[0].item() == pytest.approx(value, abs=5e-11)
        assert found[1].tolist() == pytest.approx(gradient, abs=6e-6)
        assert stats_of(STUDENT, own, logq, "renorm").dead.item() == (k == 2)
    apart = common(torch.tensor([0, 2]), LOGQ[[0, 2]], torch.tensor([1, 3]))
    found = value_and_gradient(lambda at: subset_divergence(at, torch.tensor([0, 2]), apart, "renorm")[0], STUDENT)
    assert found[0].item() == 0
    assert found[1].tolist() == [0.0] * 5


def test_o1_the_truncated_sum_may_be_negative_and_keeps_its_gradient() -> None:
    """0.6/0.4 against 0.9/0.1, top-1, in both roles: -.243279 by hand; a clamp at 0 would have no gradient."""
    one, two = (torch.tensor(pair, dtype=torch.float64).log() for pair in ([0.6, 0.4], [0.9, 0.1]))
    for student, teacher, value in ((one, two, 0.6 * math.log(0.6 / 0.9)), (two, one, 0.9 * math.log(0.9 / 0.6))):
        found, gradient = loss("partial", ids=torch.tensor([0]), teacher=teacher, at=student)
        assert found.item() == pytest.approx(value, abs=1e-15)
        assert gradient.abs().max() > 0.01
        held, _ = loss("tail_bucket", ids=torch.tensor([0]), teacher=teacher, at=student)
        assert held.item() == pytest.approx((student.exp() * (student - teacher)).sum().item(), abs=1e-15)
    assert loss("partial", ids=torch.tensor([0]), teacher=two, at=one)[0].item() == pytest.approx(-0.243279, abs=5e-7)


def test_o2_one_id_renormalised_is_a_constant_and_is_counted_as_dead() -> None:
    for kind in KINDS:
        value, gradient = loss("renorm", kind, torch.tensor([3]))
        assert value.item() == 0
        assert gradient.abs().max() == 0
    assert stats_of(STUDENT, torch.tensor([3]), LOGQ[[3]], "renorm").dead.item()
    assert not stats_of(STUDENT, torch.tensor([3]), LOGQ[[3]], "tail_bucket").dead.item()
    assert loss("tail_bucket", ids=torch.tensor([3]))[1].abs().max() > 0.01


@pytest.mark.parametrize(("mode", "flees"), [("tail_bucket", False), ("partial_sg", False), ("partial", True)])
def test_o3_the_students_mass_on_the_teachers_top_k_does_not_shrink(mode: Mode, flees: bool) -> None:
    """Reverse KL on the teacher's support, 100 steps from a student that holds less of it than the teacher."""
    ids = TEACHER.topk(2).indices
    logits, masses = STUDENT.clone(), []
    for _ in range(100):
        masses.append(logits.softmax(0)[ids].sum().item())
        logits = logits - 0.5 * loss(mode, ids=ids, at=logits)[1]
    assert masses[0] < Q[ids].sum().item()
    assert (masses[-1] < masses[0]) == flees
    if not flees:
        assert min(masses) >= masses[0] - 1e-12
        assert masses[-1] == pytest.approx(Q[ids].sum().item(), abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_r10_a_ragged_row_is_the_row_without_its_holes(mode: Mode, kind: Divergence) -> None:
    """Missing entries are nan, ids that the teacher does not know -inf: neither is a probability of one or of zero."""
    logits = torch.stack([STUDENT, STUDENT, STUDENT])
    ids = torch.tensor([[0, 1, 4], [1, 0, 0], [0, 0, 0]])
    logq = LOGQ[ids]
    logq[0, 2], logq[1, 1:], logq[2] = math.nan, torch.tensor([-math.inf, math.nan]), math.nan
    value, gradient = value_and_gradient(lambda at: subset_divergence(at, ids, logq, mode, kind, 0.5)[0], logits)
    for row, kept in enumerate(([0, 1], [1])):
        truth = loss(mode, kind, torch.tensor(kept))
        assert value[row].item() == pytest.approx(truth[0].item(), abs=1e-15)
        assert torch.allclose(gradient[row], truth[1], atol=1e-15)
    assert value[2].item() == pytest.approx(0, abs=1e-15)
    assert gradient[2].tolist() == [0.0] * 5
    stats = stats_of(logits, ids, logq, mode)
    assert stats.dead.tolist() == [False, mode == "renorm", True]
    assert stats.student_mass.tolist() == pytest.approx([P[:2].sum().item(), P[1].item(), 0])
    assert stats.teacher_mass.tolist() == pytest.approx([Q[:2].sum().item(), Q[1].item(), 0])
    assert stats.ratio[0].item() == pytest.approx((P[:2].sum() / Q[:2].sum()).item())


def test_ids_for_all_positions_are_those_of_each() -> None:
    logits = torch.stack([STUDENT, TEACHER])
    fixed, _ = subset_divergence(logits, S, torch.stack([LOGQ[S], LOGQ[S]]))
    each, _ = subset_divergence(logits, S.expand(2, 2), torch.stack([LOGQ[S], LOGQ[S]]))
    assert torch.equal(fixed, each)
    assert fixed[0].item() == pytest.approx(0.5726264868, abs=5e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_o11_a_teacher_that_is_all_but_certain_stays_finite(mode: Mode, kind: Divergence) -> None:
    """In fp32 its mass on S rounds to 1 and its tail to 0, or the server's numbers add up to a little more than 1."""
    ids = torch.tensor([0, 2])
    for top in (0.0, 1e-6):
        logq = torch.tensor([top, -20.0])
        value, gradient = value_and_gradient(
            lambda at, logq=logq: subset_divergence(at, ids, logq, mode, kind)[0],
            STUDENT.float(),
        )
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert gradient[0] < 0  # towards the token that the teacher is certain of


def test_o10_bf16_logits_have_no_floor_on_a_subset() -> None:
    logits = (4 * torch.randn(4, 248_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    ids = logits.topk(64).indices
    logq = logits.float().log_softmax(-1).gather(-1, ids)
    for mode in ("tail_bucket", "partial_sg", "renorm"):
        value, gradient = value_and_gradient(lambda at, mode=mode: subset_divergence(at, ids, logq, mode)[0], logits)
        assert value.abs().max() < 1e-5
        assert gradient.abs().max() < 1e-6
