"""Generalised JSD: value and gradient of TRL's own function, on random logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy import value_and_gradient

from omniopd.losses import generalised_jsd

gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed")


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_o8_generalised_jsd_is_that_of_trl(beta: float, spread: float) -> None:
    """Two rows of nine positions, of which TRL's labels leave out some: summed by us, divided by their number by TRL."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (spread * torch.randn(2, 2, 9, 503, generator=generator)).unbind()
    labels = torch.randint(503, (2, 9), generator=generator).masked_fill(
        torch.rand(2, 9, generator=generator) < 0.3, -100
    )
    mask = labels != -100
    assert 0 < int(mask.sum()) < mask.numel()

    def ours(at: Tensor) -> Tensor:
        return generalised_jsd(teacher, at, beta)[mask].sum() / mask.sum()

    def theirs(at: Tensor) -> Tensor:
        return gkd.GKDTrainer.generalized_jsd_loss(at, teacher, labels=labels, beta=beta)

    (value, gradient), (value_trl, gradient_trl) = value_and_gradient(ours, logits), value_and_gradient(theirs, logits)
    assert value.item() > 1e-3
    assert value.item() == pytest.approx(value_trl.item(), abs=1e-5)
    assert (gradient - gradient_trl).abs().max() < 1e-5
    assert (gradient - gradient_trl).norm() < 1e-4 * gradient_trl.norm()
