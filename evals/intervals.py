"""How sure an accuracy is: 95 % intervals over the prompts, by percentile bootstrap.

Resampling n prompts with replacement and averaging right/wrong answers is a multinomial draw of the counts, so it is
drawn as that: the same distribution, at a fraction of the memory.

With fewer than ten prompts outside the commonest outcome (nearly all right, nearly all wrong, nearly nothing changed)
the bootstrap is too narrow, and in the extreme a single point. There we use closed forms that don't collapse: the
Wilson score interval, and for paired differences that of Bonett & Price (2012), which adds one prompt to either kind
of change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from omniopd.errors import DataError

RESAMPLES = 2000
_FEW = 10


@dataclass(frozen=True, slots=True)
class Difference:
    """The change of accuracy from before to after, with its interval, over the same prompts."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    correct: Sequence[bool], seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The interval of the share of right answers, (low, high), reproducible by seed and never of zero width.

    Raises:
        DataError: there are no answers.
    """
    n, right = len(correct), sum(map(bool, correct))
    if not n:
        raise DataError("accuracy: no answers to measure; give at least one held-out prompt")
    if min(right, n - right) < _FEW:
        return _wilson(right, n, level)
    means = _rng("accuracy", seed).binomial(n, right / n, size=resamples) / n
    return _percentiles(means, level)


def paired_difference(
    before: Sequence[bool],
    after: Sequence[bool],
    seed: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Difference:
    """The difference after - before over the same prompts in the same order; prompts are resampled as pairs.

    Raises:
        DataError: there are no answers, or not equally many.
    """
    n = len(before)
    if n != len(after) or not n:
        raise DataError(f"comparison: {n} answers before and {len(after)} after; measure both on the same prompts")
    change = np.asarray(after, dtype=int) - np.asarray(before, dtype=int)
    counts = np.array([(change == kind).sum() for kind in (-1, 0, 1)])
    mean = float(change.mean())
    if n - counts.max() < _FEW:
        low, high = _bonett_price(int(counts[0]), int(counts[2]), n, level)
    else:
        draws = _rng("difference", seed).multinomial(n, counts / n, size=resamples)
        low, high = _percentiles((draws[:, 2] - draws[:, 0]) / n, level)
    return Difference(mean, min(low, mean), max(high, mean))


def pooled_difference(
    before: Sequence[Sequence[bool]],
    after: Sequence[Sequence[bool]],
    seed: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Difference:
    """The difference after - before over several seeds, each a pair of runs measured on the same prompts in the same order.

    Seeds and prompts are resampled with replacement, independently of each other: whole rows and whole columns of the
    changes (Owen's pigeonhole bootstrap, which for such crossed effects errs on the wide side). A prompt that one seed
    wins is no new prompt for the next, so that three seeds of 300 prompts do not count as 900. A single seed is
    `paired_difference`.

    Args:
        before, after: [S][n], by seed and prompt.

    Raises:
        DataError: there are no answers, or not equally many.
    """
    sizes = {len(answers) for answers in [*before, *after]}
    if len(before) != len(after) or len(sizes) != 1 or sizes == {0}:
        raise DataError("comparison: the seeds were not measured on the same prompts; measure all on the same")
    if len(before) == 1:
        return paired_difference(before[0], after[0], seed, level, resamples)
    change = np.asarray(after, dtype=int) - np.asarray(before, dtype=int)  # [S, n]
    (seeds, n), by_prompt, mean = change.shape, change.sum(0), float(change.mean())
    if n - np.unique(by_prompt, return_counts=True)[1].max() < _FEW:
        low, high = _bonett_price(int((by_prompt < 0).sum()), int((by_prompt > 0).sum()), n, level)
    else:
        rng = _rng("pooled difference", seed)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # [R, S]
        of_prompts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)  # [R, n]
        low, high = _percentiles(((of_seeds @ change) * of_prompts).sum(1) / (seeds * n), level)
    return Difference(mean, min(low, mean), max(high, mean))


def _wilson(right: int, n: int, level: float) -> tuple[float, float]:
    """Wilson (1927): (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    z, p = _z(level), right / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends one bound is exactly 0 or 1, which rounding must not miss.
    low = 0.0 if right == 0 else (middle - half) / scale
    high = 1.0 if right == n else (middle + half) / scale
    return low, high


def _bonett_price(lost: int, won: int, n: int, level: float) -> tuple[float, float]:
    """Bonett & Price (2012): Wald's interval with one lost and one won prompt added, cut to [-1, 1]."""
    lost_share, won_share = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    middle = won_share - lost_share
    half = _z(level) * math.sqrt((won_share + lost_share - middle**2) / (n + 2))
    return max(-1.0, middle - half), min(1.0, middle + half)


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _rng(purpose: str, seed: int) -> np.random.Generator:
    """A stream of its own for each purpose and seed (which may be negative)."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:16], "big"))
