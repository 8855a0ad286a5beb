"""The distance of two continuations, against golden numbers and the best assignment by trying all."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from omniopd.optimal_transport import assignment, costs, sinkhorn, transport_cost

WORDS = torch.eye(6, dtype=torch.float64)
A, B, C = range(3)


def cost(a: list[int], b: list[int], mu: float = 0.1, eps: float = 0.05, *, exact: bool = False) -> float:
    return transport_cost(WORDS[a], WORDS[b], max(len(a), len(b)), mu, eps, exact=exact)


def assigned(matrix: Tensor) -> float:
    """The cheapest assignment of n to n: the slow reference of transport with uniform marginals."""
    n = len(matrix)
    return min(sum(float(matrix[i, j]) for i, j in enumerate(order)) for order in permutations(range(n))) / n


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("a", "b", "mu", "golden"),
    [
        ([A, B], [B, A], 0.1, 0.05),
        ([A, B], [B, A], 0.0, 0.0),
        ([A, B, C], [B, C, A], 0.1, 0.044444),
        ([A, B, C], [A, B, C], 0.1, 0.0),
    ],
)
def test_golden_costs_of_orthonormal_embeddings(
    a: list[int], b: list[int], mu: float, golden: float, exact: bool
) -> None:
    assert cost(a, b, mu, exact=exact) == pytest.approx(golden, abs=1e-6)


def test_equal_texts_cost_exactly_nothing_even_where_tokens_repeat() -> None:
    assert cost([A, A, B, A], [A, A, B, A]) == 0
    assert cost([A, A, B, A], [A, B, A, A]) > 0


def test_without_mu_order_costs_nothing_with_it_it_does() -> None:
    there, back = [0, 1, 2, 3], [3, 1, 0, 2]

    assert cost(there, back, mu=0) == pytest.approx(0, abs=1e-6)
    assert cost(there, back, mu=0.1) > 0.01
    torch.manual_seed(3)
    a, b = torch.randn(2, 7, 4, dtype=torch.float64)
    order = torch.randperm(7)
    for exact in (False, True):
        plain, turned = (transport_cost(a, side, 7, 0.0, 0.05, exact=exact) for side in (b, b[order]))
        assert turned == pytest.approx(plain, abs=1e-4) != 0
        assert transport_cost(a, b[order], 7, 0.1, 0.05, exact=exact) != pytest.approx(plain, abs=1e-3)


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


@pytest.mark.parametrize("n", [1, 2, 5, 7])
@pytest.mark.parametrize("ties", [False, True])
def test_an_assignment_is_the_best_of_all(n: int, ties: bool) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        matrix = torch.randint(0, 3, (n, n)).double() if ties else torch.randn(n, n, dtype=torch.float64)
        assert float((assignment(matrix) * matrix).sum()) == pytest.approx(assigned(matrix), abs=1e-9)


def test_an_assignment_has_uniform_marginals_and_is_symmetric() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(2, 50, 8, dtype=torch.float64)
    plan = assignment(costs(a, b, 50, 0.1))

    for side in (0, 1):
        torch.testing.assert_close(plan.sum(side), torch.full((50,), 1 / 50, dtype=torch.float64), atol=1e-6, rtol=0)
    there, back = (transport_cost(*pair, 50, 0.1, 0.05, exact=True) for pair in ((a, b), (b, a)))
    assert there == pytest.approx(back, abs=1e-9)
    assert there <= transport_cost(a, b, 50, 0.1, 0.05)


def test_of_texts_of_two_lengths_there_is_no_assignment() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(5, 4), torch.randn(3, 4)
    assert transport_cost(a, b, 5, 0.1, 0.05, exact=True) == transport_cost(a, b, 5, 0.1, 0.05)


def test_golden_distance_of_sorted_margins() -> None:
    """On a line the best assignment is that of the sorted numbers: the prototype's loss is transport, too."""
    a, b = torch.tensor([[0.2, 0.5, 0.9], [0.1, 0.5, 0.6]], dtype=torch.float64)
    matrix = (a[:, None] - b).abs()
    assert float((assignment(matrix) * matrix).sum()) == pytest.approx(0.133333, abs=1e-6)
    shuffled = matrix[[2, 0, 1]][:, [1, 2, 0]]
    assert float((assignment(shuffled) * shuffled).sum()) == pytest.approx(0.133333, abs=1e-6)


def test_no_gradient_flows_through_costs() -> None:
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    assert not costs(a, b, 4, 0.1).requires_grad


def test_a_zero_vector_is_no_division_by_nothing() -> None:
    zero = torch.zeros(2, 3)
    assert transport_cost(zero, torch.eye(3), 3, 0.1, 0.05) > 0.99
