"""Likelihood and entropy: golden numbers, and no gradient through the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy import STUDENT, TEACHER, P, finite_differences, value_and_gradient

from omniopd.losses import entropy, importance_ratio, log_probs, logp_at, token_logp, token_nll


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


def test_golden_distributions_of_the_toy() -> None:
    """What every other golden number of the sheets is made from."""
    p, q = log_probs(STUDENT).exp().tolist(), log_probs(TEACHER).exp().tolist()
    assert p == pytest.approx([0.563021, 0.207124, 0.125627, 0.076197, 0.028031], abs=6e-7)
    assert q == pytest.approx([0.123383, 0.552966, 0.074836, 0.203425, 0.045390], abs=6e-7)


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


def test_s2_samples_of_an_older_policy_with_their_ratios_give_the_on_policy_update() -> None:
    """In expectation, by enumeration of the vocabulary; without the ratio it is another update, truncated it lies between."""
    older, value = STUDENT.roll(2), torch.tensor([1.0, -2.0, 0.5, 3.0, -0.25], dtype=torch.float64)

    def mean_update(sampled_by: Tensor, most: float | None) -> Tensor:
        """`E_y[gradient of token_nll(log p(y), ratio value)]`."""
        theta = STUDENT.clone().requires_grad_()
        everything = torch.arange(len(value))
        logp, then = token_logp(theta.expand(len(value), -1), everything), sampled_by.log_softmax(-1)
        ratio = torch.ones(len(value)) if most is None else importance_ratio(logp, then).clamp(max=most)
        token_nll(logp, then.exp() * ratio * value).backward()
        assert theta.grad is not None
        return theta.grad

    on_policy = mean_update(STUDENT, None)
    p = STUDENT.softmax(-1)
    assert torch.allclose(on_policy, -p * (value - (p * value).sum()), atol=1e-12)  # the policy gradient in closed form
    assert torch.allclose(mean_update(older, math.inf), on_policy, atol=1e-12)
    assert torch.allclose(mean_update(STUDENT, 2.0), on_policy, atol=1e-12)
    error = [float((mean_update(older, most) - on_policy).norm()) for most in (None, 1.5, 5.0)]
    assert error[0] > error[1] > error[2] > 0.01


def test_l5_no_gradient_flows_through_an_importance_ratio() -> None:
    theta = STUDENT.clone().requires_grad_()
    assert not importance_ratio(token_logp(theta, torch.tensor(2)), torch.tensor(-1.0)).requires_grad
