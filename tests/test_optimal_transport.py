"""The distance of two continuations, against golden numbers and the best assignment by trying all."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from omniopd.optimal_transport import costs, sinkhorn, transport_cost

WORDS = torch.eye(6, dtype=torch.float64)
A, B, C = range(3)


def cost(a: list[int], b: list[int], mu: float = 0.1, eps: float = 0.05) -> float:
    return transport_cost(WORDS[a], WORDS[b], max(len(a), len(b)), mu, eps)


def assigned(matrix: Tensor) -> float:
    """The cheapest assignment of n to n: the slow reference of transport with uniform marginals."""
    n = len(matrix)
    return min(sum(float(matrix[i, j]) for i, j in enumerate(order)) for order in permutations(range(n))) / n


@pytest.mark.parametrize(
    ("a", "b", "mu", "golden"),
    [
        ([A, B], [B, A], 0.1, 0.05),
        ([A, B], [B, A], 0.0, 0.0),
        ([A, B, C], [B, C, A], 0.1, 0.044444),
        ([A, B, C], [A, B, C], 0.1, 0.0),
    ],
)
def test_golden_costs_of_orthonormal_embeddings(a: list[int], b: list[int], mu: float, golden: float) -> None:
    assert cost(a, b, mu) == pytest.approx(golden, abs=1e-6)


def test_equal_texts_cost_exactly_nothing_even_where_tokens_repeat() -> None:
    assert cost([A, A, B, A], [A, A, B, A]) == 0
    assert cost([A, A, B, A], [A, B, A, A]) > 0


def test_without_mu_order_costs_nothing_with_it_it_does() -> None:
    there, back = [0, 1, 2, 3], [3, 1, 0, 2]

    assert cost(there, back, mu=0) == pytest.approx(0, abs=1e-6)
    assert cost(there, back, mu=0.1) > 0.01


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 5), (7, 3), (50, 50)])
def test_the_plan_has_uniform_marginals_and_is_symmetric(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    a, b = (torch.randn(count, 8, dtype=torch.float64) for count in shape)
    plan = sinkhorn(costs(a, b, 50, 0.1), 0.05)

    torch.testing.assert_close(
        plan.sum(1), torch.full((shape[0],), 1 / shape[0], dtype=torch.float64), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        plan.sum(0), torch.full((shape[1],), 1 / shape[1], dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert transport_cost(a, b, 50, 0.1, 0.05) == pytest.approx(transport_cost(b, a, 50, 0.1, 0.05), abs=1e-4)


def test_the_cost_comes_near_the_best_assignment_as_eps_falls() -> None:
    torch.manual_seed(2)
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    exact = assigned(costs(a, b, 6, 0.1))

    assert transport_cost(a, b, 6, 0.1, 0.01) == pytest.approx(exact, abs=5e-3)
    assert transport_cost(a, b, 6, 0.1, 0.05) == pytest.approx(exact, abs=5e-2)
    assert transport_cost(a, b, 6, 0.1, 0.05) >= exact - 1e-6


def test_a_zero_vector_is_no_division_by_nothing() -> None:
    zero = torch.zeros(2, 3)
    assert transport_cost(zero, torch.eye(3), 3, 0.1, 0.05) > 0.99
