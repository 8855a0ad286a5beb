"""Golden numbers of smoothing, and the formulas of survival."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd.verification.weights import (
    calibrated,
    geometric_mean,
    log_ratio,
    n_min,
    smoothed,
    survival_advantages,
)

LOGP = (-0.1, -0.5, -0.9)


def test_weight_golden() -> None:
    pi_bar = geometric_mean(LOGP)
    assert pi_bar == pytest.approx(0.60653066, abs=5e-9)
    assert smoothed(3.2, 10, pi_bar, 1.0) == pytest.approx(0.34604824, abs=5e-9)
    assert 10 / 11 * 0.32 + 1 / 11 * pi_bar == pytest.approx(0.34604824, abs=5e-9)  # the other form
    assert smoothed(3.2, 10, pi_bar, 0.0) == pytest.approx(0.32)
    assert smoothed(0.0, 10, pi_bar, 1.0) == pytest.approx(0.05513915, abs=5e-9)


def test_l3_an_invalid_reply_leaves_both_k_and_n() -> None:
    pi_bar = geometric_mean(LOGP)
    assert smoothed(2.24, 7, pi_bar, 1.0) == pytest.approx(0.35581633, abs=5e-9)
    assert smoothed(2.24, 10, pi_bar, 1.0) == pytest.approx(0.25877552, abs=1e-8)  # the wrong rule


def test_l4_no_valid_reply_has_no_weight() -> None:
    with pytest.raises(ValueError, match="unaudited"):
        smoothed(0.0, 0, 0.9, 1.0)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.lists(st.floats(-20, 0), min_size=1, max_size=6),
    st.floats(1e-3, 20),
)
def test_l18_default_weights_lie_between_the_prior_and_one(phi: list[float], logp: list[float], alpha: float) -> None:
    pi_bar, n = geometric_mean(logp), len(phi)
    weight = smoothed(sum(phi), n, pi_bar, alpha)
    assert 0 < alpha * pi_bar / (n + alpha) * (1 - 1e-12) <= weight <= 1 + 1e-12


def test_n_min_is_half_rounded_up() -> None:
    assert [n_min(n) for n in (1, 2, 3, 9, 10)] == [1, 1, 2, 5, 5]


@pytest.mark.parametrize(
    ("phi", "floor", "expected"),
    [(0.23, 0.23, 0.0), (1.0, 0.23, 1.0), (0.6, 0.2, 0.5), (0.1, 0.2, 0.0), (1.0, 1.0, 0.0)],
)
def test_calibration(phi: float, floor: float, expected: float) -> None:
    assert calibrated(phi, floor) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "bias"), [(10, -0.04809477), (100, -0.00497551), (1000, -0.00049975)])
def test_log_ratio_bias_at_finite_n(n: int, bias: float) -> None:
    """E[A] by enumerating the binomial at q = pi = 0.5, alpha = 1; the limit is 0, OPD's advantage."""
    log_half = math.log(0.5)
    expected = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + n * log_half)
        * log_ratio(smoothed(k, n, 0.5, 1.0), 0.5)
        for k in range(n + 1)
    )
    assert expected == pytest.approx(bias, abs=5e-9)


@pytest.mark.parametrize(("q", "p"), [(0.3, 0.5), (0.8, 0.1), (0.05, 0.9)])
def test_the_log_ratio_of_one_token_and_many_replies_is_plain_distillations_advantage(q: float, p: float) -> None:
    """Exact match of one token, N to infinity: `log q - log p`, whatever the prior."""
    n = 10**12
    for alpha in (0.5, 1.0, 5.0):
        assert log_ratio(smoothed(n * q, n, p, alpha), p) == pytest.approx(math.log(q) - math.log(p), abs=1e-9)


@pytest.mark.parametrize(("n_eff", "share"), [(10, 1 / 11), (5, 1 / 6)])
def test_the_priors_share_grows_as_replies_are_lost(n_eff: int, share: float) -> None:
    assert smoothed(3.0, n_eff, 1.0, 1.0) - smoothed(3.0, n_eff, 0.0, 1.0) == pytest.approx(share)


def test_survival_golden() -> None:
    """By hand: q = (8 + .5)/11, (1 + .25)/9, then nobody at risk."""
    values, mask = survival_advantages([8, 1, 0], [10, 8, 0], [math.log(p) for p in (0.5, 0.25, 0.1)], 1.0, 5.0)
    assert values == pytest.approx([math.log(8.5 / 11 / 0.5), math.log(1.25 / 9 / 0.25), 0.0])
    assert mask == [True, True, False]


@given(st.integers(1, 30), st.floats(-200, 0), st.floats(0.01, 10), st.data())
def test_survival_equals_its_formula(at_risk: int, logp: float, strength: float, data: st.DataObject) -> None:
    survivors = data.draw(st.integers(0, at_risk))
    p = math.exp(logp)
    q = (survivors + strength * p) / (at_risk + strength)
    ((value,), mask) = survival_advantages([survivors], [at_risk], [logp], strength, clip=3.0)
    assert value == pytest.approx(max(-3.0, min(3.0, math.log(q) - logp)), abs=1e-9)
    assert mask == [True]


def test_survival_is_finite_where_p_underflows_and_without_a_prior() -> None:
    values, _ = survival_advantages([0, 3, 0], [3, 3, 3], [-1000.0, -1000.0, -1.0], 1.0, 5.0)
    assert values == pytest.approx([math.log(1 / 4), 5.0, math.log(1 / 4)])
    assert survival_advantages([0], [3], [-1.0], 0.0, 5.0) == ([-5.0], [True])


def test_survival_shrinks_to_the_student() -> None:
    """A heavy prior says what the student says, so its advantage vanishes."""
    for survivors, logp in product((0, 2, 5), (-0.1, -2.0)):
        ((value,), _) = survival_advantages([survivors], [5], [logp], 1e9, 5.0)
        assert abs(value) < 1e-6
    assert survival_advantages([5], [5], [0.0], 1.0, 5.0)[0] == [0.0]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        survival_advantages([1, 1], [1, 1], [-1.0], 1.0, 5.0)
