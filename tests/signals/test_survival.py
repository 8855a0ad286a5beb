"""Survival: plain sampled OPD in the limit, known bias and variance before it, and censoring."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
import pytest

from omniopd.signals.survival import Survival
from omniopd.types import Chunk, Reply
from omniopd.verification.agreement import survival_counts
from omniopd.verification.audit import Audit, Verdict

SIGNAL = Survival(Survival.Config())


def chunk_of(*pieces: str, closes: bool = False) -> Chunk:
    return Chunk(0, 0, len(pieces), "", "".join(pieces), tuple(accumulate(map(len, pieces))), closes)


def audit(chunk: Chunk, logp: tuple[float, ...], replies: list[Reply]) -> Audit:
    return Audit(chunk, logp, Verdict((), *survival_counts(chunk, replies), tuple(replies)))


def counted(logp: tuple[float, ...], survivors: tuple[int, ...]) -> Audit:
    return Audit(chunk_of(*"abc"[: len(logp)]), logp, Verdict((), survivors, survivors[:-1], ()))


def test_neutral_limit_is_plain_sampled_opd() -> None:
    """N -> infinity: A_j = log q_j - log p_j, the advantage of the sampled form, token by token."""
    q, p = (0.5, 0.25, 0.8), (0.7, 0.3, 0.1)
    n = 10**13
    survivors = (n, *(round(n * through) for through in accumulate(q, float.__mul__)))
    (signal,) = SIGNAL.read([counted(tuple(map(math.log, p)), survivors)])
    opd = [math.log(a) - math.log(b) for a, b in zip(q, p, strict=True)]
    assert signal.values == pytest.approx(opd, abs=1e-9)
    assert signal.mask == (True,) * 3


def test_o6_two_teachers_give_two_signals_and_the_student_itself_none() -> None:
    n, p = 10**13, (0.5, 0.25)
    logp = tuple(map(math.log, p))
    (own,) = SIGNAL.read([counted(logp, (n, n // 2, n // 8))])
    (other,) = SIGNAL.read([counted(logp, (n, n // 4, n // 8))])
    assert own.values == pytest.approx((0.0, 0.0), abs=1e-9)
    assert other.values == pytest.approx((-math.log(2), math.log(2)), abs=1e-9)


def enumerated(n: int, q: float, p: float, a: float) -> tuple[float, float]:
    """Mean and variance of A over k ~ Binomial(n, q)."""
    k = np.arange(n + 1)
    chance = np.array([math.comb(n, i) for i in k]) * q**k * (1 - q) ** (n - k)
    values = np.log((k + a * p) / (n + a)) - math.log(p)
    mean = float(chance @ values)
    return mean, float(chance @ (values - mean) ** 2)


@pytest.mark.parametrize(("q", "p"), [(0.3, 0.5), (0.8, 0.5), (0.5, 0.5), (0.1, 0.6)])
def test_bias_and_variance_at_finite_n(q: float, p: float) -> None:
    """Enumeration against continuations drawn as text; the bias is real at N = 8 and shrinks as 1/N."""
    rng, n, draws = np.random.default_rng(7), 8, 4000
    chunk = chunk_of("ab")
    audits = [
        audit(chunk, (math.log(p),), [Reply(text, "length") for text in rng.choice(["abc", "xyz"], n, p=[q, 1 - q])])
        for _ in range(draws)
    ]
    values = np.array([signal.values[0] for signal in SIGNAL.read(audits)])
    mean, variance = enumerated(n, q, p, 1.0)
    assert values.mean() == pytest.approx(mean, abs=4 * (variance / draws) ** 0.5)
    assert values.var() == pytest.approx(variance, rel=0.15)
    bias = [abs(enumerated(n, q, p, 1.0)[0] - math.log(q / p)) for n in (50, 100, 200)]
    assert bias[1] / bias[0] == pytest.approx(0.5, abs=0.12)
    assert bias[2] / bias[1] == pytest.approx(0.5, abs=0.06)


def test_golden_bias_of_the_sheet() -> None:
    """The one-token case is the log-ratio form: q = p = .5, a = 1."""
    means = [enumerated(n, 0.5, 0.5, 1.0)[0] for n in (10, 100, 1000)]
    assert means[:2] == pytest.approx([-0.04809477, -0.00497551], abs=5e-9)
    assert means[2] == pytest.approx(-0.00049975, abs=5e-9)


def test_l3_censored_continuations_do_not_bias_the_estimate() -> None:
    """Each token is right with q = .8; replies are cut at random lengths. Counting a cut as disagreement would show."""
    rng, n, q = np.random.default_rng(3), 20_000, 0.8
    chunk = chunk_of(*"aaaaa")
    replies = [
        Reply("".join(rng.choice(["a", "x"], int(length), p=[q, 1 - q])), "length") for length in rng.integers(1, 6, n)
    ]
    survivors, at_risk = survival_counts(chunk, replies)
    estimates = [s / r for s, r in zip(survivors[1:], at_risk, strict=True)]
    assert estimates == pytest.approx([q] * 5, abs=0.03)
    naive = [after / before for before, after in pairwise(survivors)]
    assert min(naive) < 0.5
    (signal,) = SIGNAL.read([audit(chunk, (math.log(0.5),) * 5, replies)])
    assert signal.values == pytest.approx([math.log(q / 0.5)] * 5, abs=0.05)


def test_no_survivors_no_signal() -> None:
    replies = [Reply("1x", "stop"), Reply("1", "length")]
    (signal,) = SIGNAL.read([audit(chunk_of("1", "2", "3"), (-1.0, -1.0, -1.0), replies)])
    assert signal.mask == (True, True, False)
    assert signal.values[0] > 0 > signal.values[1]
    assert signal.values[2] == 0.0


def test_tokens_of_one_character_share_their_advantage() -> None:
    """Three pieces of an emoji with p = .5 each are one step with p = .125; the tail that nothing decides is masked."""
    chunk, logp = chunk_of("", "", "😀", ""), (math.log(0.5),) * 4
    replies = [Reply("😀", "length")] * 3 + [Reply("😁", "length")]
    (signal,) = SIGNAL.read([audit(chunk, logp, replies)])
    expected = math.log((3 + 0.125) / 5) - math.log(0.125)
    assert signal.values == pytest.approx((expected, expected, expected, 0.0))
    assert signal.mask == (True, True, True, False)


def test_the_end_of_the_response_is_a_token_like_another() -> None:
    chunk = chunk_of("7", "", closes=True)
    stops, goes_on = [Reply("7", "stop")] * 4, [Reply("7.", "stop")] * 4
    (up,) = SIGNAL.read([audit(chunk, (-0.1, -1.0), stops)])
    (down,) = SIGNAL.read([audit(chunk, (-0.1, -1.0), goes_on)])
    (unknown,) = SIGNAL.read([audit(chunk, (-0.1, -1.0), [Reply("7", "length")] * 4)])
    assert up.values[1] > 0 > down.values[1]
    assert unknown.mask == (True, False)


def test_clip_and_strength_are_settings() -> None:
    replies = [Reply("7", "stop")] * 9
    (clipped,) = SIGNAL.read([audit(chunk_of("7"), (-30.0,), replies)])
    (tight,) = Survival(Survival.Config(clip=0.5)).read([audit(chunk_of("7"), (-30.0,), replies)])
    (prior,) = Survival(Survival.Config(strength=9.0)).read([audit(chunk_of("7"), (-1.0,), replies)])
    assert (clipped.values, tight.values) == ((5.0,), (0.5,))
    assert prior.values == pytest.approx((math.log((9 + 9 * math.exp(-1)) / 18) + 1,))
