"""The published weight, and its named variants."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from pydantic import ValidationError

from omniopd.registry import SIGNALS
from omniopd.signals.likelihood_weight import LikelihoodWeight
from omniopd.types import Chunk
from omniopd.verification.audit import Audit, Verdict

LOGP = (-0.1, -0.5, -0.9)
CHUNK = Chunk(0, 0, 3, "", "abc", (1, 2, 3))


def audit(*scores: float) -> Audit:
    return Audit(CHUNK, LOGP, Verdict(scores, (len(scores), 0, 0, 0), (len(scores), 0, 0), ()))


def read(*audits: Audit, **options: object) -> list[tuple[float, ...]]:
    config = LikelihoodWeight.Config.model_validate(options)
    return [signal.values for signal in LikelihoodWeight(config).read(audits)]


def test_weight_golden_on_every_token() -> None:
    (values,) = read(audit(*[0.32] * 10))
    assert values == pytest.approx((0.34604824,) * 3, abs=5e-9)
    assert read(audit(*[0.32] * 10), alpha=0)[0] == pytest.approx((0.32,) * 3)


def test_n_eff_golden() -> None:
    assert read(audit(*[0.32] * 7))[0][0] == pytest.approx(0.35581633, abs=5e-9)


def test_the_order_of_replies_changes_nothing() -> None:
    weights = {round(read(audit(*order))[0][0], 12) for order in permutations((0.1, 0.5, 0.9, 0.2))}
    assert len(weights) == 1


def test_l18_weights_are_positive_by_default_and_negative_only_when_centred() -> None:
    audits = [audit(*[phi] * 10) for phi in (0.0, 0.3, 1.0)]
    assert all(0 < values[0] <= 1 for values in read(*audits))
    centred = [values[0] for values in read(*audits, centred=True)]
    assert sum(centred) == pytest.approx(0.0, abs=1e-12)
    assert min(centred) < 0 < max(centred)


def test_log_ratio_is_signed() -> None:
    pi_bar = math.exp(-0.5)
    (low,), (high,) = ({v[0]} for v in read(audit(*[0.0] * 10), audit(*[1.0] * 10), form="log_ratio"))
    assert low == pytest.approx(math.log(1 / 11))
    assert high == pytest.approx(math.log((10 + pi_bar) / 11 / pi_bar))


def test_log_ratio_without_a_prior_is_refused() -> None:
    with pytest.raises(ValidationError, match="alpha above 0"):
        LikelihoodWeight.Config(form="log_ratio", alpha=0)


def test_the_three_signals_are_found_by_name() -> None:
    assert SIGNALS.get("likelihood_weight") is LikelihoodWeight
    assert {"survival", "continuation_likelihood"} <= set(SIGNALS.names())
    for name in SIGNALS.names():
        assert SIGNALS.get(name).Config().name == name
