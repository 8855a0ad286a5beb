"""Divergences over the vocabulary against golden numbers, ten-line references and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toy import STUDENT, TEACHER, P, Q, finite_differences, value_and_gradient

from omniopd.losses import entropy, forward_kl, generalised_jsd, reverse_kl

Kind = Callable[[Tensor, Tensor], Tensor]


def jsd_of(beta: float) -> Kind:
    return lambda teacher, logits: generalised_jsd(teacher, logits, beta)


def slow(teacher: Tensor, logits: Tensor, beta: float) -> Tensor:
    """The formulas as GKD words them, with probabilities: forward KL at 0, reverse KL at 1."""
    p, q = torch.softmax(logits, -1), torch.softmax(teacher, -1)
    if beta == 0:
        return (q * torch.log(q / p)).sum(-1)
    if beta == 1:
        return (p * torch.log(p / q)).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * torch.log(q / m)).sum(-1) + (1 - beta) * (p * torch.log(p / m)).sum(-1)


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        (reverse_kl, 0.6280302556, [0.501084, -0.333471, -0.013820, -0.122677, -0.031115]),
        (forward_kl, 0.5385717422, [0.439638, -0.345842, 0.050791, -0.127228, -0.017359]),
        (jsd_of(0.5), 0.1363653448, [0.103444, -0.076067, 0.006175, -0.027984, -0.005568]),
        (jsd_of(0.1), 0.0481910567, None),
        (jsd_of(0.25), 0.1003296390, None),
        (jsd_of(0.75), 0.1073049562, None),
        (jsd_of(0.9), 0.0540503123, None),
    ],
)
def test_golden_values_and_gradients(kind: Kind, value: float, gradient: list[float] | None) -> None:
    found, slope = value_and_gradient(lambda at: kind(TEACHER, at), STUDENT)
    assert found.item() == pytest.approx(value, abs=5e-11)
    assert torch.allclose(slope, finite_differences(lambda at: kind(TEACHER, at), STUDENT), atol=1e-8)
    if gradient is not None:
        assert slope.tolist() == pytest.approx(gradient, abs=5e-7)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_o8_o15_every_beta_is_the_ten_line_reference(beta: float) -> None:
    """Value and gradient; forward KL at 0 and reverse KL at 1, not the other way round."""
    generator = torch.Generator().manual_seed(0)
    teacher, logits = (4 * torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)).unbind()
    ours = value_and_gradient(lambda at: generalised_jsd(teacher, at, beta), logits)
    truth = value_and_gradient(lambda at: slow(teacher, at, beta), logits)
    assert ours[0].shape == (6,)
    for fast, reference in zip(ours, truth, strict=True):
        assert torch.allclose(fast, reference, atol=1e-12)


def test_the_jsd_divided_by_the_distance_from_its_ends_goes_to_the_kls() -> None:
    """And itself to 0: it is not continuous there."""
    low, high = generalised_jsd(TEACHER, STUDENT, 1e-4).item(), generalised_jsd(TEACHER, STUDENT, 1 - 1e-4).item()
    assert low / 1e-4 == pytest.approx(0.538514, abs=5e-7)
    assert high / 1e-4 == pytest.approx(0.627935, abs=5e-7)
    assert max(low, high) < 1e-4


def test_o6_o7_the_reverse_kl_has_the_expected_gradient_of_the_sampled_form() -> None:
    """Every token enumerated: `E_y[sg(log q - log p) grad log p(y)]`, downhill. Differentiated, k1 loses its teacher."""

    def sampled(at: Tensor, detached: bool) -> Tensor:
        logp = at.log_softmax(0)
        advantage = TEACHER.log_softmax(0) - logp
        return -(P * (advantage.detach() * logp if detached else advantage)).sum()

    dense = value_and_gradient(lambda at: reverse_kl(TEACHER, at), STUDENT)[1]
    assert torch.allclose(value_and_gradient(lambda at: sampled(at, True), STUDENT)[1], dense, atol=1e-12)
    assert value_and_gradient(lambda at: sampled(at, False), STUDENT)[1].abs().max() < 1e-12
    value = reverse_kl(TEACHER, STUDENT)
    as_advantage = value_and_gradient(lambda at: (P * value * at.log_softmax(0)).sum(), STUDENT)[1]
    assert as_advantage.abs().max() < 1e-12


@pytest.mark.parametrize("kind", [reverse_kl, forward_kl, jsd_of(0.5)])
def test_o6_another_teacher_gives_another_gradient_and_gets_none(kind: Kind) -> None:
    teacher = TEACHER.clone().requires_grad_()
    student = STUDENT.clone().requires_grad_()
    kind(teacher, student).backward()
    assert teacher.grad is None
    assert student.grad is not None
    other = value_and_gradient(lambda at: kind(TEACHER.flip(0), at), STUDENT)[1]
    assert (other - student.grad).abs().max() > 0.05


@pytest.mark.parametrize(("kind", "rounding"), [(reverse_kl, 0.0), (forward_kl, 0.0), (jsd_of(0.3), 1e-15)])
def test_o4_nothing_is_left_where_the_teacher_is_the_student(kind: Kind, rounding: float) -> None:
    value, gradient = value_and_gradient(lambda at: kind(STUDENT, at), STUDENT)
    assert abs(value.item()) <= rounding
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("kind", [reverse_kl, forward_kl, jsd_of(0.5)])
def test_o10_identical_bf16_logits_over_a_large_vocabulary_have_no_floor(kind: Kind) -> None:
    logits = (4 * torch.randn(4, 248_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    value, gradient = value_and_gradient(lambda at: kind(logits, at), logits)
    assert value.dtype == torch.float32
    assert value.abs().max().item() < 1e-5
    assert gradient.abs().max().item() < 1e-6
    p = logits.log_softmax(-1)  # the same in bf16, to know that the test could fail
    naive = -(p.exp() * p).sum(-1).float()
    assert (naive - entropy(logits)).abs().max().item() > 1e-2


@pytest.mark.parametrize("kind", [reverse_kl, forward_kl, jsd_of(0.5)])
def test_r12_padded_vocabularies_are_cut_to_the_shorter_one(kind: Kind) -> None:
    """Whatever stands in the padding of the wider side changes nothing, and gets no gradient."""
    padding = torch.tensor([7.0, -3.0], dtype=torch.float64)
    assert torch.equal(kind(torch.cat([TEACHER, padding]), STUDENT), kind(TEACHER, STUDENT))
    value, gradient = value_and_gradient(lambda at: kind(TEACHER, at), torch.cat([STUDENT, padding]))
    assert value.item() == kind(TEACHER, STUDENT).item()
    assert gradient[5:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [reverse_kl, forward_kl, jsd_of(0.5)])
def test_o11_padding_of_no_probability_stays_finite(kind: Kind) -> None:
    """-inf on the teacher's side, then on both."""
    pad = torch.full((3,), -torch.inf, dtype=torch.float64)
    teacher = torch.cat([TEACHER, pad])
    value, gradient = value_and_gradient(
        lambda at: kind(teacher, at), torch.cat([STUDENT, torch.zeros(3, dtype=torch.float64)])
    )
    assert value.isfinite()
    assert gradient.isfinite().all()
    value, gradient = value_and_gradient(lambda at: kind(teacher, at), torch.cat([STUDENT, pad]))
    truth, slope = value_and_gradient(lambda at: kind(TEACHER, at), STUDENT)
    assert value.item() == pytest.approx(truth.item(), abs=1e-15)
    assert torch.allclose(gradient[:5], slope, atol=1e-15)
    assert gradient[5:].tolist() == [0.0] * 3


def test_o11_the_reverse_kl_ignores_what_the_teacher_can_not_say() -> None:
    """As if the vocabulary ended before: the infinite value would stop the run, and a clamp would train something else."""
    teacher = torch.cat([TEACHER, torch.full((2,), -torch.inf, dtype=torch.float64)])
    student = torch.cat([STUDENT, torch.tensor([1.0, 3.0], dtype=torch.float64)])
    value, gradient = value_and_gradient(lambda at: reverse_kl(teacher, at), student)
    assert value.item() == pytest.approx(0.6280302556, abs=5e-11)
    assert gradient[5:].tolist() == [0.0, 0.0]


def test_o5_a_summand_may_be_negative_and_is_not_clipped() -> None:
    """Where p < q a summand of the reverse KL is negative; finite differences there, at a sharp teacher."""
    teacher = 8 * TEACHER
    _, gradient = value_and_gradient(lambda at: reverse_kl(teacher, at), STUDENT)
    assert (P * (P / teacher.softmax(0)).log()).min() < -0.1
    assert torch.allclose(gradient, finite_differences(lambda at: reverse_kl(teacher, at), STUDENT), atol=1e-7)


def test_l7_the_anchor_is_kl_of_reference_to_student() -> None:
    """With student samples E[r log r], r = ref / student, estimates it; the common k3 form estimates the other one."""
    p, r = P, Q / P
    exact = forward_kl(TEACHER, STUDENT).item()
    gradient = value_and_gradient(lambda at: forward_kl(TEACHER, at), STUDENT)[1]
    golden = [0.4396378691, -0.3458419318, 0.0507912253, -0.1272281366, -0.0173590259]
    assert gradient.tolist() == pytest.approx(golden, abs=5e-11)
    assert (p * r * r.log()).sum().item() == pytest.approx(exact, abs=1e-12)
    k3 = (p * (r - 1 - r.log())).sum().item()
    assert k3 == pytest.approx(0.6280302556, abs=5e-11)  # KL(student || reference)
    assert abs(k3 - exact) > 0.05
    draws = torch.multinomial(p, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimates = (r * r.log())[draws]
    assert abs(estimates.mean().item() - exact) < 4 * estimates.std().item() / math.sqrt(len(draws))
