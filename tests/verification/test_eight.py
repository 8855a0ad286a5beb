"""The pure parts of the eight tests that catch most ways in which distillation goes quietly wrong.

Numbers 5 to 8, and the paper's toy numbers; number 3 (sliced against dense) is `tests/test_losses.py::test_o9_*`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from omniopd.scores.edit_distance import EditDistance, similarity
from omniopd.scores.token_agreement import TokenAgreement
from omniopd.signals.continuation_likelihood import ContinuationLikelihood
from omniopd.signals.likelihood_weight import LikelihoodWeight
from omniopd.signals.survival import Survival
from omniopd.types import Chunk, Reply
from omniopd.verification.audit import Audit, Verdict, constant_values, judge_all, shuffled
from omniopd.verification.weights import smoothed

ACTIONS = "abcd"
LOGITS = np.array([0.3, -0.2, 0.5, 0.1])
PHI = np.array([0.4, 0.3, 0.2, 0.1])
EXACT = TokenAgreement(TokenAgreement.Config())


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def weights(p: np.ndarray, phi: np.ndarray, alpha: float, exponent: float = 1.0) -> np.ndarray:
    """pi_hat of each action at N = 10, by the library's formula."""
    return np.array([smoothed(10 * f, 10, float(prob) ** exponent, alpha) for f, prob in zip(phi, p, strict=True)])


def ascent(logits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """E_y[values_y grad log p_y], exactly: grad log p_y = onehot(y) - p."""
    p = softmax(logits)
    return p * (values - p @ values)


def audits_of(actions: Iterable[int], p: np.ndarray, said: Sequence[str]) -> list[Audit]:
    """One audited chunk of one token per action; every teacher reply is one of the texts `said`."""
    chunks = [Chunk(0, 0, 1, "", action, (1,)) for action in ACTIONS]
    verdicts = judge_all(chunks, [[Reply(text, "length") for text in said]] * 4, EXACT)
    logp = np.log(p).tolist()
    return [Audit(chunks[y], (logp[y],), verdicts[y]) for y in actions]


def with_scores(audits: Sequence[Audit], phi: float) -> list[Audit]:
    verdict = Verdict((phi,) * 10, (10, 10), (10,), ())
    return [Audit(a.chunk, a.logp, verdict) for a in audits]


def updates(actions: np.ndarray, p: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """The ascent direction of each draw: value times grad log p."""
    return np.asarray(values)[:, None] * (np.eye(4)[actions] - p)


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    p = softmax(LOGITS)
    return np.random.default_rng(seed).choice(4, count, p=p), p


def assert_mean(samples: np.ndarray, expected: np.ndarray, errors: float = 4.0) -> None:
    """Equal within the error bar, and the bar is narrow enough to tell."""
    error = samples.std(0) / np.sqrt(len(samples))
    assert error.max() < 0.005
    assert (np.abs(samples.mean(0) - expected) < errors * error + 1e-12).all()


@pytest.mark.parametrize(
    ("exponent", "golden"),
    [
        (1.0, [0.03785564, 0.00620870, -0.01281199, -0.03125235]),
        (1 / 50, [0.03766635, 0.00757875, -0.01477294, -0.03047216]),
    ],
)
def test_expected_update_golden(exponent: float, golden: list[float]) -> None:
    """It is the gradient of J = N/(N+a) E[phi] + a/((N+a)(1+e)) sum p^(1+e), the pseudo-objective of our analysis."""

    def objective(logits: np.ndarray) -> float:
        p = softmax(logits)
        return float(10 / 11 * p @ PHI + 1 / (11 * (1 + exponent)) * (p ** (1 + exponent)).sum())

    direction = ascent(LOGITS, weights(softmax(LOGITS), PHI, 1.0, exponent))
    numeric = [(objective(LOGITS + h) - objective(LOGITS - h)) / 2e-6 for h in 1e-6 * np.eye(4)]
    assert direction == pytest.approx(golden, abs=5e-9)
    assert direction == pytest.approx(numeric, abs=1e-8)


def test_agree_everywhere_has_zero_expected_gradient_by_enumeration() -> None:
    p = softmax(LOGITS)
    assert ascent(LOGITS, np.full(4, 0.7)) == pytest.approx(np.zeros(4), abs=1e-15)
    per_sample = updates(np.arange(4), p, [0.7] * 4)
    assert np.abs(per_sample).max(1).min() > 0.1  # though a single update is not zero


def bandit(start: Sequence[float], phi: Sequence[float], alpha: float, steps: int) -> float:
    logits = np.array(start, dtype=float)
    for _ in range(steps):
        p = softmax(logits)
        pi_hat = (10 * np.asarray(phi) + alpha * p) / (10 + alpha)
        logits += ascent(logits, pi_hat)
    return float(softmax(logits).max())


@pytest.mark.parametrize(
    ("start", "phi", "alpha", "steps", "mass"),
    [
        ((0, 0, 0, 0), PHI, 1.0, 2000, 0.99844302),
        ((0, 0, 0, 0), PHI, 0.0, 2000, 0.99762412),
        ((0.1, 0, 0, 0), (0.25,) * 4, 1.0, 2000, 0.99447922),
        ((0.1, 0, 0, 0), (0.25,) * 4, 1.0, 20000, 0.99957528),
        ((0.1, 0, 0, 0), (0.25,) * 4, 0.0, 2000, 0.26921435),
    ],
)
def test_bandit_golden(start: Sequence[float], phi: Sequence[float], alpha: float, steps: int, mass: float) -> None:
    """The prior alone sharpens: with flat phi it drives the policy to one action, without it nothing moves."""
    assert bandit(start, phi, alpha, steps) == pytest.approx(mass, abs=5e-9)
    p = softmax(np.array(start, dtype=float))
    direct = (10 * np.asarray(phi) + alpha * p) / (10 + alpha)
    assert weights(p, np.asarray(phi), alpha) == pytest.approx(direct, abs=1e-15)  # the loop's formula is the library's


# 5. Holes stay holes.


@pytest.mark.parametrize("signal", [LikelihoodWeight, Survival, ContinuationLikelihood])
def test_eight_5_holes_stay_holes(signal: Any) -> None:
    """Refused, cut before the first token ended, or undecidable: mask 0 and value 0, next to a chunk with a verdict."""
    chunks = [
        Chunk(0, 0, 2, "", "12+", (2, 3)),
        Chunk(1, 0, 2, "", "12+", (2, 3)),
        Chunk(2, 0, 2, "", "", (0, 0)),
        Chunk(3, 0, 2, "", "12+", (2, 3)),
    ]
    replies = [[Reply("12+7", "length")], [], [], [Reply("", "length")]]
    verdicts = judge_all(chunks, replies, EXACT)
    audits = [Audit(c, (-1.0, -2.0), v) for c, v in zip(chunks, verdicts, strict=True)]
    good, *holes = signal(signal.Config()).read(audits)
    assert good.mask == (True, True)
    for hole in holes:
        assert hole.mask == (False, False)
        assert hole.values == (0.0, 0.0)
        assert hole.targets == ()
    assert [v.n_eff for v in verdicts] == [1, 0, 0, 0]


def test_eight_5_a_hole_does_not_move_the_centre() -> None:
    config = LikelihoodWeight.Config(centred=True, alpha=0)
    scored = [Audit(Chunk(0, 0, 1, "", "a", (1,)), (-1.0,), Verdict((s,), (1, 1), (1,), ())) for s in (0.2, 0.6)]
    hole = Audit(scored[0].chunk, (-1.0,), Verdict((), (0, 0), (0,), ()))
    low, empty, high = LikelihoodWeight(config).read([scored[0], hole, scored[1]])
    assert (low.values[0], high.values[0]) == pytest.approx((-0.2, 0.2))
    assert (empty.values, empty.mask) == ((0.0,), (False,))


# 6. Agreement everywhere must not steer.


def test_eight_6_agreement_everywhere_does_not_steer_without_a_prior() -> None:
    actions, p = drawn(20_000)
    audits = with_scores(audits_of(actions, p, []), 0.3)
    signal = LikelihoodWeight(LikelihoodWeight.Config(alpha=0)).read(audits)
    values = [s.values[0] for s in signal]
    assert values == pytest.approx([0.3] * len(values))
    assert_mean(updates(actions, p, values), np.zeros(4))


def test_eight_6_centred_agreement_gives_no_update_at_all() -> None:
    actions, p = drawn(50)
    audits = with_scores(audits_of(actions, p, []), 0.3)
    signal = LikelihoodWeight(LikelihoodWeight.Config(alpha=0, centred=True)).read(audits)
    assert max(abs(s.values[0]) for s in signal) < 1e-12


@pytest.mark.parametrize("centred", [False, True])
def test_eight_6_with_a_prior_the_drift_is_the_analytic_sharpening(centred: bool) -> None:
    """`alpha/(N+alpha) * grad sum p^2 / 2`, no more; centring leaves it in place."""
    actions, p = drawn(20_000)
    audits = with_scores(audits_of(actions, p, []), 0.3)
    signal = LikelihoodWeight(LikelihoodWeight.Config(alpha=20.0, centred=centred)).read(audits)
    sharpening = 20 / 30 * ascent(LOGITS, p)
    assert np.abs(sharpening).max() > 0.01
    assert_mean(updates(actions, p, [s.values[0] for s in signal]), sharpening)


# 7. Placebo.

TEACHER = "a" * 7 + "b" * 2 + "c"  # ten continuations of the same distribution, exactly


@pytest.mark.parametrize("signal", [LikelihoodWeight(LikelihoodWeight.Config(alpha=0)), Survival(Survival.Config())])
def test_eight_7_shuffled_verdicts_do_not_steer_toward_the_teacher(signal: Any) -> None:
    actions, p = drawn(20_000)
    audits = audits_of(actions, p, TEACHER)
    true = updates(actions, p, [s.values[0] for s in signal.read(audits)])
    assert true.mean(0)[0] > 0.05  # the teacher's favourite rises
    mixed = shuffled(audits, seed=0)
    assert Counter(a.verdict for a in mixed) == Counter(a.verdict for a in audits)
    placebo = updates(actions, p, [s.values[0] for s in signal.read(mixed)])
    if isinstance(signal, LikelihoodWeight):
        assert_mean(placebo, np.zeros(4))
    toward = np.array([0.7, 0.2, 0.1, 0.0]) - p  # shuffled survival still flattens the policy, by its own -log p
    assert placebo.mean(0) @ toward < 0.15 * (true.mean(0) @ toward)


@pytest.mark.parametrize("signal", [LikelihoodWeight(LikelihoodWeight.Config()), Survival(Survival.Config())])
def test_eight_7_constant_values_do_not_steer(signal: Any) -> None:
    actions, p = drawn(20_000)
    audits = audits_of(actions, p, TEACHER)
    constant = constant_values(signal.read(audits), [a.chunk for a in audits])
    assert_mean(updates(actions, p, [s.values[0] for s in constant]), np.zeros(4))


# 8. Monte-Carlo limit.


def test_monte_carlo_golden() -> None:
    """C = 1, exact match, q = .3, pi = .5, N = 10, alpha = 1: mean .31818182, sd .13173979."""
    rng = np.random.default_rng(0)
    signal = LikelihoodWeight(LikelihoodWeight.Config())
    chunks = [Chunk(0, 0, 1, "", "a", (1,))] * 4000
    replies = [[Reply(text, "length") for text in rng.choice(["a", "b"], 10, p=[0.3, 0.7])] for _ in chunks]
    audits = [
        Audit(c, (float(np.log(0.5)),), v) for c, v in zip(chunks, judge_all(chunks, replies, EXACT), strict=True)
    ]
    values = np.array([s.values[0] for s in signal.read(audits)])
    assert values.mean() == pytest.approx(0.31818182, abs=4 * 0.13173979 / 4000**0.5)
    assert values.std() == pytest.approx(0.13173979, rel=0.05)
    q, n = 0.3, 10
    mean, sd = (n * q + 0.5) / 11, (n * q * (1 - q)) ** 0.5 / 11
    assert (mean, sd) == pytest.approx((0.31818182, 0.13173979), abs=5e-9)


def test_eight_8_one_token_chunks_and_exact_match_give_the_teachers_probability() -> None:
    teacher = softmax(np.array([1.0, 0.2, -0.5, 0.0]))
    said = np.random.default_rng(1).choice(list(ACTIONS), 20_000, p=teacher)
    audits = audits_of(range(4), softmax(LOGITS), list(said))
    estimate = np.array([a.verdict.k / a.verdict.n_eff for a in audits])
    assert np.abs(estimate - teacher).max() < 4 * 0.5 / 20_000**0.5
    assert np.ptp(teacher) > 0.3


def test_eight_8_edit_distance_tends_to_its_enumerated_expectation() -> None:
    """A teacher of two tokens, the second depending on the first: k/N -> E[phi], whose optimum is not the mode."""
    first, second = softmax(np.array([0.8, 0.0, -0.4, 0.1])), [softmax(row) for row in np.eye(4) * 1.5]
    texts = ["".join(pair) for pair in product(ACTIONS, repeat=2)]
    q = np.array([first[i] * second[i][j] for i, j in product(range(4), repeat=2)])
    said = np.random.default_rng(2).choice(texts, 4000, p=q)
    chunks = [Chunk(0, 0, 2, "", text, (1, 2)) for text in texts]
    score = EditDistance(EditDistance.Config())
    verdicts = judge_all(chunks, [[Reply(str(text), "length") for text in said]] * len(chunks), score)
    expected = np.array([q @ [similarity(chunk, text) for text in texts] for chunk in texts])
    estimate = np.array([v.k / v.n_eff for v in verdicts])
    assert np.abs(estimate - expected).max() < 4 * 0.5 / 4000**0.5
    assert np.ptp(expected) > 0.2
    assert not np.allclose(expected / expected.sum(), q, atol=0.05)  # typical is not probable
