"""Optimal transport between two short texts in an embedding space: how far apart two continuations are."""

from __future__ import annotations

import torch
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
    """The plan Gamma [n, n] with uniform marginals that minimises <Gamma, C>: 1/n at the places of a permutation.

    The Hungarian method: rows enter one by one, each along the shortest path of reduced costs `C_ij - u_i - v_j >= 0` to a
    free column; n^3 operations.
    """
    n = len(cost)
    u, v = torch.zeros(n, dtype=cost.dtype), torch.zeros(n, dtype=cost.dtype)
    row_of, column_of = [-1] * n, [-1] * n  # the pairs so far
    for first in range(n):
        distance, through = (
            torch.full_like(v, torch.inf),
            [first] * n,
        )  # of each column, and the row that it is reached from
        reached: list[int] = []
        row, so_far = first, 0.0
        while row >= 0:
            nearer = so_far + cost[row] - u[row] - v
            nearer[reached] = torch.inf
            for column in (nearer < distance).nonzero()[:, 0].tolist():
                through[column] = row
            distance = distance.minimum(nearer)
            open_ends = distance.index_fill(0, torch.tensor(reached, dtype=torch.long), torch.inf)
            column = int(open_ends.argmin())
            so_far, row = float(distance[column]), row_of[column]
            reached.append(column)
        u[first] += so_far
        for taken in reached[:-1]:
            u[row_of[taken]] += so_far - distance[taken]
            v[taken] -= so_far - distance[taken]
        while row != first:  # every row on the path takes the next column
            row = through[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    plan = torch.zeros_like(cost)
    plan[torch.arange(n), column_of] = 1 / n
    return plan
