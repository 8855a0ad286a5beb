"""The sheets' toy: five tokens, one position, in float64; and the slow way to a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STUDENT = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)
TEACHER = torch.tensor([0.5, 2.0, 0.0, 1.0, -0.5], dtype=torch.float64)
P, Q = STUDENT.softmax(0), TEACHER.softmax(0)


def value_and_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A function of logits, and its gradient by autograd; summed over positions, where there are several."""
    leaf = at.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, coordinate by coordinate."""
    flat = []
    for i in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[i] = step
        shift = shift.view_as(at)
        flat.append((function(at + shift) - function(at - shift)) / (2 * step))
    return torch.stack(flat).view_as(at)


def trained(loss: Callable[[Tensor], Tensor], steps: int = 1000, rate: float = 2.0) -> Tensor:
    """A free student of five logits, after gradient descent from the toy's."""
    logits = STUDENT.clone()
    for _ in range(steps):
        logits = logits - rate * value_and_gradient(loss, logits)[1]
    return logits.softmax(0)
