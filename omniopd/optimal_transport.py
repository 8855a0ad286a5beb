"""Optimal transport between two short texts in an embedding space: how far apart two continuations are."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS, ITERATIONS = 50, 10  # at most so many rounds, of so many iterations each
TOLERANCE = 1e-4  # of the marginals, in all


def transport_cost(a: Tensor, b: Tensor, horizon: int, mu: float, eps: float, *, exact: bool = False) -> float:
    """D = sum_ij Gamma_ij C_ij of embeddings [m, E] and [n, E], with `costs` and the plan of `sinkhorn`.

    Equal texts cost exactly 0, which the regularised plan blurs. No gradient flows.

    Args:
        exact: of texts of one length, the plan of `assignment`.
    """
    if a.shape == b.shape and torch.equal(a, b):
        return 0.0
    cost = costs(a, b, horizon, mu)
    plan = assignment(cost) if exact and len(a) == len(b) else sinkhorn(cost, eps)
    return float((plan * cost).sum())


def costs(a: Tensor, b: Tensor, horizon: int, mu: float) -> Tensor:
    """C [m, n]: 1 - cos(a_i, b_j) + mu |i - j| / horizon, in float64; a zero vector has cosine 0 to all."""
    one, other = (torch.nn.functional.normalize(side.detach().double(), dim=-1) for side in (a, b))
    apart = (torch.arange(len(one))[:, None] - torch.arange(len(other))).abs()
    return 1 - one @ other.T + mu * apart / horizon


def sinkhorn(cost: Tensor, eps: float) -> Tensor:
    """The plan Gamma [m, n] with uniform marginals that minimises <Gamma, C> - eps entropy(Gamma).

    Those of the columns are exact, those of the rows up to `TOLERANCE`. `eps` must be at least 1/300 of the largest cost, or
    the kernel vanishes.
    """
    m, n = cost.shape
    kernel = (-cost / eps).exp()
    rows = torch.full((m,), 1 / m, dtype=cost.dtype)
    columns = 1 / n / (kernel.T @ rows)
    for _ in range(ROUNDS):
        for _ in range(ITERATIONS):
            rows = 1 / m / (kernel @ columns)
            columns = 1 / n / (kernel.T @ rows)
        if float((rows * (kernel @ columns) - 1 / m).abs().sum()) < TOLERANCE:
            break
    return rows[:, None] * kernel * columns


def assignment(cost: Tensor) -> Tensor:
    """The plan Gamma [n, n] with uniform marginals that minimises <Gamma, C>: 1/n at the places of a permutation."""
    rows, columns = linear_sum_assignment(cost.numpy())
    plan = torch.zeros_like(cost)
    plan[rows, columns] = 1 / len(cost)
    return plan
