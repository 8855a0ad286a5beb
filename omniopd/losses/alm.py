"""Approximate likelihood matching (ALM, arXiv 2503.20083): a chunk's likelihood as a coin, compared between two models.

Source: tokenkit [official code] for the binarised cross-entropy; the gradient in closed form, the scale tau and the floor
[ours].
"""

from __future__ import annotations

import torch
from torch import Tensor

TAU = 100.0  # [official code]
FLOOR = 1e-4  # nats; a chunk is never taken to be more certain than this, which bounds the gradient


def alm_loss(student: Tensor, teacher: Tensor, tau: float = TAU) -> Tensor:
    """`tau KL(B_T || B_S)`, [C], in nats: 0 where both sides agree.

    `B` is the coin `(e^(L / tau), 1 - e^(L / tau))` of a chunk's log-likelihood L. It differs from ALM's binary
    cross-entropy by the teacher's entropy, a constant, and by the factor tau, with which neither the value nor the gradient
    depends on tau to first order: for `a = -L_T`, `b = -L_S`, `rho = b / a` it tends to `a (rho - 1 - log rho)`.

    Args:
        student, teacher: [C] `L_S` and `L_T` in nats, float64 for long chunks and large tau.
    """
    a, b = _surprise(student, teacher, tau)
    heads = (-a).exp()
    return tau * (heads * (b - a) + (1 - heads) * (_log_tails(a) - _log_tails(b)))


def alm_slope(student: Tensor, teacher: Tensor, tau: float = TAU) -> Tensor:
    """`- d alm_loss / d L_S`, [C]: `(e^(L_T / tau) - e^(L_S / tau)) / (1 - e^(L_S / tau))`.

    As the value on each of the chunk's tokens it gives the loss's exact gradient, since L_S is the sum of their log-probs.
    It tends to `(L_T - L_S) / -L_S`: below 0 where the teacher finds the chunk less likely than the student, and at most 1.
    """
    a, b = _surprise(student, teacher, tau)
    apart = -torch.minimum(a, b).neg().exp() * torch.expm1(-(b - a).abs())
    return (b - a).sign() * apart / -torch.expm1(-b)


def _surprise(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """`a / tau` and `b / tau` of teacher and student."""
    return -teacher.clamp(max=-FLOOR) / tau, -student.clamp(max=-FLOOR) / tau


def _log_tails(x: Tensor) -> Tensor:
    """`log(1 - e^-x)` for x > 0."""
    return (-torch.expm1(-x)).log()
