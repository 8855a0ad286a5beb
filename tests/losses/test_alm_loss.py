"""ALM's chunk loss: golden numbers, the closed slope against autograd, and both ends of the scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from omniopd.losses.alm import FLOOR, alm_loss, alm_slope


def nats(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def coin_kl(student: float, teacher: float, tau: float) -> float:
    """The slow reference: tau times the KL of two coins, by probabilities."""
    heads_s, heads_t = math.exp(student / tau), math.exp(teacher / tau)
    tails = (1 - heads_t) * math.log((1 - heads_t) / (1 - heads_s))
    return tau * (heads_t * math.log(heads_t / heads_s) + tails)


@pytest.mark.parametrize(("tau", "golden"), [(1e7, 0.262266), (100.0, 0.261610), (1.0, 0.198575)])
def test_golden_values(tau: float, golden: float) -> None:
    assert alm_loss(nats(-1.2), nats(-0.5), tau).item() == pytest.approx(golden, abs=6e-7)


def test_o15_the_loss_is_the_coins_kl_and_tends_to_its_limit() -> None:
    for student, teacher in [(-1.2, -0.5), (-0.5, -1.2), (-7.0, -0.01), (-0.02, -30.0)]:
        for tau in (1.0, 10.0, 100.0):
            expected = coin_kl(student, teacher, tau)
            assert alm_loss(nats(student), nats(teacher), tau).item() == pytest.approx(expected, rel=1e-9)
        rho = student / teacher
        limit = -teacher * (rho - 1 - math.log(rho))
        assert alm_loss(nats(student), nats(teacher), 1e6).item() == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_the_slope_is_the_losss_own_gradient(tau: float) -> None:
    student = nats(-1.2, -3.0, -0.01, -50.0, -FLOOR * 2, -0.7).requires_grad_()
    teacher = nats(-0.5, -7.0, -3.0, -1e-12, -9.0, -0.7)
    (gradient,) = torch.autograd.grad(alm_loss(student, teacher, tau).sum(), student)
    torch.testing.assert_close(alm_slope(student.detach(), teacher, tau), -gradient, rtol=1e-9, atol=1e-9)


def test_o5_loss_and_slope_agree_with_finite_differences() -> None:
    at, step = nats(-2.3, -0.4), 1e-6
    difference = (alm_loss(at + step, nats(-0.9, -4.0)) - alm_loss(at - step, nats(-0.9, -4.0))) / (2 * step)
    assert alm_slope(at, nats(-0.9, -4.0)).tolist() == pytest.approx((-difference).tolist(), rel=1e-6)


def test_the_slope_has_the_sign_of_the_log_ratio_and_is_zero_where_both_agree() -> None:
    student, teacher = nats(-1.0, -1.0, -1.0, -3e4), nats(-1.0, -0.2, -8.0, -3e4)
    assert alm_slope(student, teacher).sign().tolist() == [0, 1, -1, 0]
    assert alm_loss(student, teacher)[[0, 3]].tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_o11_certain_and_impossible_chunks_stay_finite(tau: float) -> None:
    """A student that is sure where the teacher is not is corrected, not left alone; two that are sure agree."""
    extremes = (0.0, -1e-12, -1e-9, -1.0, -1e3, -1e6)
    student = nats(*[s for s in extremes for _ in extremes])
    teacher = nats(*[t for _ in extremes for t in extremes])
    assert alm_loss(student, teacher, tau).isfinite().all()
    assert alm_slope(student, teacher, tau).isfinite().all()
    assert alm_slope(nats(0.0), nats(-3.0), tau).item() < -9e3
    assert alm_loss(nats(0.0), nats(-1e-9), tau).item() == 0


def test_the_gradient_hardly_depends_on_tau() -> None:
    student, teacher = nats(-1.2, -0.5), nats(-0.5, -1.2)
    limit = (teacher - student) / -student
    torch.testing.assert_close(alm_slope(student, teacher, 100.0), limit, rtol=2e-2, atol=0)
    torch.testing.assert_close(alm_slope(student, teacher, 1e6), limit, rtol=1e-5, atol=0)
