"""Divergences between next-token distributions of two vocabularies. V: the student's size, W: the teacher's.

- BPM (byte-prefix mapping), arXiv 2607.22334 [second-hand]: teacher mass moves to the student token that opens its text.
- GOLD with the "bayesian" merge [official code https://github.com/huggingface/trl, trl/experimental/gold]: groups of tokens
  that spell the same bytes; equal tokens by generalised JSD, the others by sorted L1.
- ULD, arXiv 2402.12030 [official code https://github.com/Nicolas-BZRD/llm-recipes]: sorted L1 alone.

Log-probs come in fp32 or wider. No gradient is wanted on the teacher's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from omniopd.losses.divergence import generalised_jsd
from omniopd.losses.likelihood import log_probs

FLOOR = 1e-8  # GOLD reads no probability as less, in logs and in products [official code]


def mapped_mass(teacher_logits: Tensor, students: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`t(u) = sum of q(w) over teacher tokens w that map to u` and the residual, the mass of those that map to none.

    `sum_u t(u) + residual = 1` in each row.

    Args:
        teacher_logits: [r, n], of the teacher tokens that the softmax is over.
        students: [n], the student token of each; negative, or `size` and more, where there is none.

    Returns:
        [r, size] and [r].
    """
    lost = (students < 0) | (students >= size)
    mass = teacher_logits.softmax(-1)
    total = mass.new_zeros(len(mass), size + 1).index_add_(1, students.masked_fill(lost, size), mass)
    return total[:, :size], total[:, size]


def mapped_divergence(
    target: Tensor, residual: Tensor, logits: Tensor, beta: float = 0.0, mapped: Tensor | None = None
) -> Tensor:
    """`JSD_beta` of the mapped teacher and the student with the residual as one more outcome, in nats, [r].

    The student's share of that outcome is what it gives to tokens that no teacher token maps to: within a number that the
    teacher has ended, whatever is no digit. At beta = 0 that is the forward KL `sum_u t(u) log(t(u) / p(u)) + R log(R / P)`,
    with the residual R and that share P. Where `mapped` holds every student token, or is not given, the residual says
    nothing, and the divergence is `(1 - R) JSD_beta(t / (1 - R), p)`: the student keeps its own proportions. A row whose
    mass is all residual then gives 0. [ours]

    Args:
        target, residual: [r, V] and [r], as `mapped_mass` gives them.
        logits: [r, V], the student's.
        mapped: [r, V] bool, the student tokens that the residual does not stand for.

    Raises:
        ValueError: beta is 1. The reverse KL is infinite, since student tokens that no teacher token maps to have t = 0.
    """
    if beta == 1:
        raise ValueError("the reverse KL to a mapped target is infinite")
    some = target.sum(-1) > 0
    logt = target.log().where(some[:, None], 0.0)
    alone = (1 - residual).where(some, 0.0) * generalised_jsd(logt, logits, beta)
    if mapped is None or not bool((told := (~mapped).any(-1) & (residual > 0)).any()):
        return alone
    logp = log_probs(logits[told])
    rest = logp.masked_fill(mapped[told], -torch.inf).logsumexp(-1, keepdim=True)
    student = torch.cat([logp.masked_fill(~mapped[told], -torch.inf), rest], -1)
    teacher = torch.cat([target[told], residual[told, None]], -1).log()
    return alone.masked_fill(told, 0.0).index_put((told,), generalised_jsd(teacher, student, beta))


def bayesian_merge(logp: Tensor, ids: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """`log p(v) = sum_i log p_i(y_i) + log p_last(v)`, the chain rule over each group's earlier tokens: [r, V] -> [g, V].

    A group's probabilities add up to that of its earlier tokens. Each of these is read as `FLOOR` at the least.

    Args:
        logp: [r, V], log-probs of the next token.
        ids: [r], the tokens that were written.
        groups: [g] runs [start, end) of positions.
    """
    written = logp.gather(-1, ids[:, None])[:, 0].clamp(min=_log_floor(logp))
    earlier = [(group, i) for group, (start, end) in enumerate(groups) for i in range(start, end - 1)]
    owner, at = torch.tensor(earlier, dtype=torch.long, device=logp.device).reshape(-1, 2).T
    carried = logp.new_zeros(len(groups)).index_add(0, owner, written[at])
    return logp[[end - 1 for _, end in groups]] + carried[:, None]


def gold_divergence(
    logp: Tensor, teacher_logp: Tensor, matched: Tensor, beta: float = 0.5, matched_weight: float | None = None
) -> Tensor:
    """`w JSD_beta(matched) + (1 - w) L1(sorted unmatched)`, w = matched / W by default: [g, V], [g, W] -> [g].

    With `m = beta q + (1 - beta) p` the matched part is `beta sum q log(q/m) + (1 - beta) sum p log(p/m)`, forward KL at
    beta = 0 and reverse KL at beta = 1, over matched tokens only and with no probability below `FLOOR`.

    Args:
        logp, teacher_logp: log-probs, merged over each group.
        matched: [2, m] pairs (teacher id, student id).
    """
    theirs, ours = matched
    weight = len(theirs) / teacher_logp.shape[-1] if matched_weight is None else matched_weight
    floor = _log_floor(logp)
    equal = _jsd_of_masses(teacher_logp[:, theirs].clamp(min=floor), logp[:, ours].clamp(min=floor), beta)
    rest = sorted_l1(_without(logp, ours).exp(), _without(teacher_logp, theirs).exp())
    return weight * equal + (1 - weight) * rest


def sorted_l1(probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """`sum_k |p_(k) - q_(k)|` of probabilities sorted downwards, the narrower side padded by zeros: [r, V], [r, W] -> [r].

    Where one side has no entries there is nothing to compare, and the value is 0 [official code].
    """
    if not probs.shape[-1] or not teacher_probs.shape[-1]:
        return probs.sum(-1) * 0
    width = max(probs.shape[-1], teacher_probs.shape[-1])
    p, q = (pad(side.sort(-1, descending=True).values, (0, width - side.shape[-1])) for side in (probs, teacher_probs))
    return (p - q).abs().sum(-1)


def _jsd_of_masses(logq: Tensor, logp: Tensor, beta: float) -> Tensor:
    """The generalised JSD of finite log-masses that need not add up to 1: [g, m], [g, m] -> [g]."""
    if beta == 0:
        return (logq.exp() * (logq - logp)).sum(-1)
    if beta == 1:
        return (logp.exp() * (logp - logq)).sum(-1)
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
    from_teacher, from_student = ((side.exp() * (side - logm)).sum(-1) for side in (logq, logp))
    return beta * from_teacher + (1 - beta) * from_student


def _without(logp: Tensor, ids: Tensor) -> Tensor:
    """The columns that are not among `ids`."""
    kept = torch.ones(logp.shape[-1], dtype=torch.bool, device=logp.device)
    kept[ids] = False
    return logp[:, kept]


def _log_floor(logp: Tensor) -> float:
    return float(torch.tensor(FLOOR, dtype=logp.dtype).log())
