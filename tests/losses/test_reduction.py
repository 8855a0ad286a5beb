"""How terms are averaged: golden numbers, and one loss however the step is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from omniopd.losses import forward_kl, reduction_scales, token_logp, token_nll
from omniopd.objective import Reduction

STUDENT = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)
LOGP = [(-0.2, -0.6), (-1.0, -0.4)]
KL = (0.05, 0.01, 0.02, 0.12)


@pytest.mark.parametrize(("mode", "golden"), [("sum_seqmean", 0.84), ("term_mean", 0.21), ("token_mean", 0.105)])
def test_reductions_golden(mode: Reduction, golden: float) -> None:
    value = sum(token_nll(torch.tensor(c), torch.full((2,), w)).item() for c, w in zip(LOGP, (0.5, 0.3), strict=True))
    a, b = reduction_scales(mode, audited=4, unaudited=4, sequences=1)
    assert a * value + 0.1 * b * sum(KL) == pytest.approx(golden)


def test_reductions_of_nothing_are_zero_and_of_overlapping_terms_told() -> None:
    assert reduction_scales("term_mean", 0, 4, 1) == (0.0, 0.25)
    assert reduction_scales("term_mean", 4, 0, 1) == (0.25, 0.0)
    assert reduction_scales("token_mean", 0, 0, 0) == (0.0, 0.0)
    assert reduction_scales("token_mean", 2, 8, 1, response_tokens=8) == (0.125, 0.125)


def test_l8_beta_means_what_the_mode_says_whatever_the_lengths() -> None:
    """Two responses of unequal length: term_mean weighs a mean against a mean, sums weigh the audited share in."""
    for audited, unaudited in ((500, 3500), (500, 500)):
        value_scale, kl_scale = reduction_scales("term_mean", audited, unaudited, 1)
        assert (kl_scale * unaudited) / (value_scale * audited) == pytest.approx(1.0)
        value_scale, kl_scale = reduction_scales("sum_seqmean", audited, unaudited, 1)
        assert (kl_scale * unaudited) / (value_scale * audited) == pytest.approx(unaudited / audited)


@pytest.mark.parametrize(("length", "share", "beta"), [(4000, 7, 0.7), (8000, 15, 1.5), (1000, 1, 0.1)])
def test_l8_the_beta_of_term_mean_that_holds_as_strongly_as_0_1_in_sums(length: int, share: float, beta: float) -> None:
    """500 audited tokens: |U| / |A| of the sheet."""
    (value, kl), (value_of_sums, kl_of_sums) = (
        reduction_scales(mode, 500, length - 500, 1) for mode in ("term_mean", "sum_seqmean")
    )
    assert kl_of_sums / value_of_sums == pytest.approx(share * kl / value)
    assert 0.1 * kl_of_sums / value_of_sums == pytest.approx(beta * kl / value)


@pytest.mark.parametrize("mode", ["sum_seqmean", "term_mean", "token_mean"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_o12_split_into_micro_batches(mode: Reduction, parts: int) -> None:
    """Four ragged sequences as 1, 2 and 4 micro-batches: the loss and gradient of one batch."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 9, 1, 6]
    edges = [sum(lengths[:i]) for i in range(5)]
    total = sum(lengths)
    inputs = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    ref = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (total,), generator=generator)
    weights = torch.rand(total, generator=generator, dtype=torch.float64)
    audited = torch.rand(total, generator=generator) < 0.4
    a, b = reduction_scales(mode, int(audited.sum()), int((~audited).sum()), 4)
    theta = STUDENT.clone().requires_grad_()

    def micro(rows: slice) -> Tensor:
        logits = inputs[rows] * theta
        value = token_nll(token_logp(logits, targets[rows]), weights[rows] * audited[rows])
        return a * value + 0.1 * b * (forward_kl(ref[rows], logits) * ~audited[rows]).sum()

    whole = micro(slice(0, total))
    (expected,) = torch.autograd.grad(whole, theta)
    loss = 0.0
    for start, end in pairwise(edges[:: 4 // parts]):
        part = micro(slice(start, end))
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(whole.item(), abs=1e-12)
    assert theta.grad is not None
    assert torch.allclose(theta.grad, expected, atol=1e-12)
