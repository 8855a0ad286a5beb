"""Divergences that look at some ids of the vocabulary only: S, K ids at each position. p is the student, q the teacher.

Log-probs are those over the whole vocabulary. `M_p` and `M_q` are the masses of S; modes differ in what becomes of the rest:

- `tail_bucket`: one more outcome, of probability `1 - M`. A true divergence, at most the full one; its fixed point is p = q
  on S, the tail's shape is free
- `renorm`: both sides normalised on S. The proportions inside S come to agree, nothing holds its mass
- `partial`: the bare sum over S. For the reverse KL it is no divergence: it may be negative, and its gradient holds that of
  `M_p` as well, so that its fixed point is `p = q / e`: mass flees from S
- `partial_sg`: for the reverse KL `sum_S p (sg[log p] - log q)`, of the same value without that extra gradient: its fixed
  point is p = q on S. For the other divergences, which have no such extra, the same as `partial`

Source: arXiv 2605.11182 [official code] (`topk_reverse_kl_notail` is `partial`, `..._notail_sg` `partial_sg`,
`full_vocab_topk_reverse_kl` `tail_bucket`); forward KL and JSD in these modes, and the fixed points [ours].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omniopd.losses.divergence import Divergence, forward_kl, generalised_jsd, reverse_kl
from omniopd.losses.likelihood import log_probs, logp_at

Mode = Literal["tail_bucket", "partial_sg", "renorm", "partial"]


@dataclass(frozen=True, slots=True)
class SubsetStats:
    """What S holds at each position [...]: the student's and the teacher's mass, and whether nothing can be learned there.

    A position is dead where its loss is a constant: S is empty, or is one id that is renormalised.
    """

    student_mass: Tensor
    teacher_mass: Tensor
    dead: Tensor

    @property
    def ratio(self) -> Tensor:
        """`M_p / M_q`, which is p/q on S where the proportions inside S agree."""
        return self.student_mass / self.teacher_mass


def subset_divergence(
    logits: Tensor,
    ids: Tensor | None,
    logq: Tensor,
    mode: Mode = "tail_bucket",
    divergence: Divergence = "reverse",
    beta: float = 0.5,
) -> tuple[Tensor, SubsetStats]:
    """The divergence [...] on S in nats, with gradient to the student's logits, and what S holds.

    An id is left out of S where its `logq` is nan (the teacher named fewer) or -inf (it does not know the id).

    Args:
        logits: [..., V], the student's.
        ids: [..., K] per position, [K] for all, or None for the whole vocabulary, which is `full_divergence`.
        logq: [..., K], the teacher's log-probs of `ids` over its whole vocabulary; [..., V] if `ids` is None.
        beta: the teacher's share of the JSD's mixture.
    """
    if ids is None:
        everything = torch.ones(logits.shape[:-1], device=logits.device)
        value = full_divergence(logq, logits, divergence, beta)
        return value, SubsetStats(everything, everything, torch.zeros_like(everything, dtype=torch.bool))
    logp = logp_at(logits, ids.expand(*logits.shape[:-1], ids.shape[-1]))
    outside = ~(logq.isfinite() & logp.detach().isfinite())
    logp, logq = (side.masked_fill(outside, -torch.inf) for side in (logp, logq.detach().to(logp.dtype)))
    masses = logp.detach().exp().sum(-1), logq.exp().sum(-1)
    held = (~outside).sum(-1)
    stats = SubsetStats(*masses, held <= (1 if mode == "renorm" else 0))
    if mode == "tail_bucket":
        logp, logq = _with_tail(logp), _with_tail(logq)
    elif mode == "renorm":
        empty = (held == 0)[..., None]  # nothing to normalise: any constant gives 0
        logp, logq = log_probs(logp.masked_fill(empty, 0.0)), log_probs(logq.masked_fill(empty, 0.0))
    return _between(logq, logp, divergence, beta, detached=mode == "partial_sg"), stats


def full_divergence(teacher_logits: Tensor, logits: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """Reverse KL, forward KL or generalised JSD by name, over the whole vocabulary: [..., V], [..., V] -> [...]."""
    if divergence == "reverse":
        return reverse_kl(teacher_logits, logits)
    return (
        forward_kl(teacher_logits, logits) if divergence == "forward" else generalised_jsd(teacher_logits, logits, beta)
    )


def common(ids: Tensor, logq: Tensor, teacher_ids: Tensor) -> Tensor:
    """`logq` with nan at the ids that are not among the teacher's: [..., K], [..., K], [..., J] -> [..., K].

    With mode `renorm` this is `topk_reverse_kl_intersect_sg_norm` [official code]: renormalised, the sg changes nothing.
    """
    shared = (ids[..., :, None] == teacher_ids[..., None, :]).any(-1)
    return logq.masked_fill(~shared, torch.nan)


def _with_tail(logp: Tensor) -> Tensor:
    """One more outcome with the mass that the others leave, at least the rounding error of one: [..., K] -> [..., K + 1]."""
    rest = (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(logp.dtype).eps)
    return torch.cat([logp, rest.log()], -1)


def _between(logq: Tensor, logp: Tensor, divergence: Divergence, beta: float, detached: bool) -> Tensor:
    if divergence == "reverse" or (divergence == "jsd" and beta == 1):
        return _kl(logp, logp.detach() if detached else logp, logq)
    if divergence == "forward" or beta == 0:
        return _kl(logq, logq, logp)
    nowhere = (logq == -torch.inf) & (logp == -torch.inf)  # m = 0, whose logarithm has no gradient
    q, p = logq.masked_fill(nowhere, 0.0), logp.masked_fill(nowhere, 0.0)
    logm = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return beta * _kl(logq, q, logm) + (1 - beta) * _kl(logp, p, logm)


def _kl(logw: Tensor, loga: Tensor, logb: Tensor) -> Tensor:
    """`sum_v w (log a - log b)`, 0 where w is 0: [..., K] -> [...]."""
    return (logw.exp() * (loga - logb).masked_fill(logw == -torch.inf, 0.0)).sum(-1)
