"""Preference losses: golden numbers of the standard forms, and slopes that are those of autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniopd.losses.preference import FLOOR, log_odds, log_odds_slope, log_ratio, pair_loss, pair_slope

BETA = 0.1
stable = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # whatever else the machine does


def exact(value: float, learned: bool = False) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=learned)


def close(value: float) -> object:
    return pytest.approx(value, abs=5e-11)


def test_dpo_golden() -> None:
    chosen = log_ratio(exact(-12), exact(-14), BETA)
    margin = chosen - log_ratio(exact(-20), exact(-18), BETA)
    assert float(margin) == close(0.4)
    assert float(pair_loss(margin)) == close(0.5130152524)
    assert BETA * float(pair_slope(margin)) == close(0.0401312340)


def test_dpo_at_the_reference_is_log_2_and_its_slope_half_of_beta() -> None:
    margin = log_ratio(exact(-12), exact(-12), BETA) - log_ratio(exact(-20), exact(-20), BETA)
    assert float(pair_loss(margin)) == close(0.6931471806) == math.log(2)
    assert BETA * float(pair_slope(margin)) == BETA / 2


def test_orpo_golden() -> None:
    good, bad = log_odds(exact(-0.5)), log_odds(exact(-1.0))
    assert (float(good), float(bad)) == (close(0.4327521296), close(-0.5413248546))
    assert float(good - bad) == close(0.9740769842)
    assert float(pair_loss(good - bad)) == close(0.3202997852)
    assert 0.5 + 0.1 * float(pair_loss(good - bad)) == close(0.5320299785)


def test_a_certain_response_has_finite_odds() -> None:
    certain = exact(0.0)
    assert float(log_odds(certain)) == pytest.approx(-math.log(FLOOR))
    assert float(log_odds_slope(certain)) == 1.0


@stable
@given(st.floats(-30, -2e-6))
def test_the_odds_slope_is_that_of_autograd(mean: float) -> None:
    mean_logp = exact(mean, learned=True)
    log_odds(mean_logp).backward()
    assert mean_logp.grad is not None
    assert log_odds_slope(mean_logp).item() == pytest.approx(float(mean_logp.grad), rel=1e-9)


@stable
@given(st.floats(-800, 800))
def test_the_pair_slope_is_that_of_autograd_and_both_are_finite(value: float) -> None:
    margin = exact(value, learned=True)
    loss = pair_loss(margin)
    loss.backward()
    assert margin.grad is not None and math.isfinite(loss.item())
    assert pair_slope(margin).item() == pytest.approx(-float(margin.grad), rel=1e-9, abs=1e-300)
    assert 0 <= pair_slope(margin).item() <= 1
