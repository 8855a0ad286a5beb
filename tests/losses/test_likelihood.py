"""Likelihood and entropy: golden numbers, and no gradient through the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy import STUDENT, P, finite_differences, value_and_gradient

from omniopd.losses import entropy, logp_at, token_logp, token_nll


def test_o15_log_probs_at_some_ids_are_those_of_the_softmax() -> None:
    """Two positions, ids that occur twice; against the softmax written out, in value and gradient."""
    logits = torch.stack([STUDENT, 30 * STUDENT.flip(0)])
    ids = torch.tensor([[0, 3, 3], [4, 1, 0]])
    mix = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -0.25]], dtype=torch.float64)

    def slow(at: Tensor) -> Tensor:
        return mix * (at - at.exp().sum(-1, keepdim=True).log()).gather(1, ids)

    for fast, truth in zip(
        value_and_gradient(lambda at: mix * logp_at(at, ids), logits), value_and_gradient(slow, logits), strict=True
    ):
        assert torch.allclose(fast, truth, atol=1e-12)
    assert torch.equal(token_logp(logits, ids[:, 0]), logp_at(logits, ids)[:, 0])


def test_half_precision_logits_are_reduced_in_fp32_and_get_their_gradient_back_in_their_own() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    value, gradient = value_and_gradient(lambda at: token_logp(at, torch.tensor([1, 2, 3])), logits)
    assert (value.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(value, logits.double().log_softmax(-1)[range(3), [1, 2, 3]].float(), atol=1e-6)


def test_entropy_golden() -> None:
    assert entropy(torch.zeros(8)).item() == pytest.approx(math.log(8), abs=1e-6)
    assert entropy(STUDENT).item() == pytest.approx(-(P * P.log()).sum().item(), abs=1e-12)
    padded = torch.cat([STUDENT, torch.full((3,), -torch.inf, dtype=torch.float64)])
    assert entropy(padded).item() == pytest.approx(entropy(STUDENT).item(), abs=1e-12)


def test_l5_no_gradient_leaks_through_the_weight() -> None:
    """Autograd equals finite differences with the weight frozen, and not those where it moves with the policy."""
    targets = torch.tensor([0, 2, 1])

    def logp(theta: Tensor) -> Tensor:
        return token_logp(theta * torch.tensor([[1.0], [0.7], [-0.4]], dtype=torch.float64), targets)

    def weight(theta: Tensor) -> Tensor:
        return (3.2 + logp(theta).mean().exp()).expand(3) / 11

    theta = STUDENT.clone().requires_grad_()
    token_nll(logp(theta), weight(theta)).backward()
    frozen = weight(STUDENT)
    expected = finite_differences(lambda at: -(frozen * logp(at)).sum(), STUDENT)
    leaking = finite_differences(lambda at: -(weight(at) * logp(at)).sum(), STUDENT)
    assert theta.grad is not None
    assert torch.allclose(theta.grad, expected, atol=1e-8)
    assert not torch.allclose(theta.grad, leaking, atol=1e-3)
