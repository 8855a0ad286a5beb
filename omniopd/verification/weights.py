"""From counts of agreement to numbers on tokens. Plain floats: nothing here carries a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence


def geometric_mean(logp: Sequence[float]) -> float:
    """`pi_bar(c) = exp((1/C) sum_t log pi(y_t))`, in (0, 1]: the student's own opinion of a chunk.

    Source: arXiv 2606.01476 [second-hand].

    Args:
        logp: [C], nats, of the chunk's tokens.
    """
    return math.exp(math.fsum(logp) / len(logp))


def smoothed(k: float, n_eff: int, pi_bar: float, alpha: float) -> float:
    """`pi_hat = (k + alpha * pi_bar) / (n_eff + alpha)`: a soft match count with a Dirichlet-multinomial pseudo-count.

    In (0, 1] for `0 <= k <= n_eff` and alpha > 0. Source: arXiv 2606.01476 [second-hand].

    Raises:
        ValueError: no valid reply. The formula would return pi_bar, which is the student praising itself.
    """
    if n_eff < 1:
        raise ValueError("a chunk without a valid reply has no weight; leave it unaudited")
    return (k + alpha * pi_bar) / (n_eff + alpha)


def log_ratio(pi_hat: float, pi_bar: float) -> float:
    """`A_c = log pi_hat - log pi_bar`. [ours] Experimental, and biased at finite N.

    With one-token chunks, exact match and N -> infinity this is plain OPD's advantage.
    """
    return math.log(pi_hat) - math.log(pi_bar)


def n_min(n: int) -> int:
    """`ceil(n / 2)`: a chunk with fewer valid replies than this is dropped. [ours]"""
    return (n + 1) // 2


def calibrated(phi: float, floor: float) -> float:
    """`(phi - floor) / (1 - floor)`, clipped to [0, 1]: similarity above what unrelated text would get. [ours]"""
    return min(1.0, max(0.0, (phi - floor) / (1.0 - floor))) if floor < 1.0 else 0.0


def survival_advantages(
    survivors: Sequence[int], at_risk: Sequence[int], logp: Sequence[float], strength: float, clip: float
) -> tuple[list[float], list[bool]]:
    """Advantages of single tokens from survival counts, and a mask of those that some reply could speak about. [ours]

    `q_j = (s_j + a p_j) / (r_j + a)` estimates the teacher's probability of token j, shrunk to the student's p_j
    where replies are few; `A_j = log q_j - log p_j`, clipped to [-clip, clip]. For r_j -> infinity this is plain
    sampled OPD. Nobody at risk: masked, with value 0.

    Args:
        survivors: [J], s_j: replies that agree through token j.
        at_risk: [J], r_j: replies that agree through the token before and could speak about token j.
        logp: [J], nats, the student's log-probs.
        strength: a, in replies.
        clip: nats.
    """
    values = [
        max(-clip, min(clip, _advantage(s, r, lp, strength))) if r else 0.0
        for s, r, lp in zip(survivors, at_risk, logp, strict=True)
    ]
    return values, [r > 0 for r in at_risk]


def _advantage(survivors: int, at_risk: int, logp: float, strength: float) -> float:
    """`log q - log p`, with q / p written out where nobody survived, as p may be too small for a float."""
    if survivors == 0:
        return math.log(strength / (at_risk + strength)) if strength > 0 else -math.inf
    return math.log((survivors + strength * math.exp(logp)) / (at_risk + strength)) - logp
