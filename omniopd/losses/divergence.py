"""Divergences between the teacher's and the student's next-token distributions, exact over the vocabulary, in nats.

p is the student, q the teacher. Reductions are in fp32, or fp64 where the logits are. Padded vocabularies of different
width mean the same tokens up to the end of the shorter one: both are cut to it before they are normalised. No gradient flows
to the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from omniopd.losses.likelihood import log_probs

Divergence = Literal["reverse", "forward", "jsd"]


def reverse_kl(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """`KL(p || q) = sum_v p(v) (log p(v) - log q(v))`: [..., V], [..., V] -> [...].

    The dense form of plain on-policy distillation. Its gradient on the student's logits is `p (log p - log q - KL)`. Where
    the teacher gives an id no probability at all (padding), the sum would be infinite: such ids are left out of both before
    normalising, as if they did not exist.
    """
    teacher_logits, logits = _same_width(teacher_logits, logits)
    absent = teacher_logits == -torch.inf
    if bool(absent.any()):
        logits = logits.masked_fill(absent, -torch.inf)
    return _against(teacher_logits, logits, _reverse_kl)


def forward_kl(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """`KL(q || p) = sum_v q(v) (log q(v) - log p(v))`: [..., V], [..., V] -> [...].

    Also the anchor of arXiv 2606.01476 [second-hand], q being the initial student. Its gradient on the student's logits
    is `p - q`. Entries to which q gives no probability (padded vocabulary) add nothing.
    """
    return _against(*_same_width(ref_logits, logits), _forward_kl)


def generalised_jsd(teacher_logits: Tensor, logits: Tensor, beta: float) -> Tensor:
    """`beta KL(q || m) + (1 - beta) KL(p || m)`, `m = beta q + (1 - beta) p`: [..., V], [..., V] -> [...].

    Source: GKD, arXiv 2306.13649 [paper]. Its gradient on the student's logits is
    `(1 - beta) p (log p - log m - KL(p || m))`. The ends are special-cased: forward KL at beta 0, reverse KL at beta 1
    [official code of TRL and ms-swift]. It is not continuous there: the formula itself goes to 0 at both ends.
    """
    if beta == 0:
        return forward_kl(teacher_logits, logits)
    if beta == 1:
        return reverse_kl(teacher_logits, logits)
    return _against(*_same_width(teacher_logits, logits), lambda logq, logp: _jsd(logq, logp, beta))


Formula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Log-probs of teacher and student [..., V] to (value [...], gradient on the student's logits [..., V]). Uses both up."""


class _Closed(torch.autograd.Function):
    """A divergence with its gradient written out: three or four tensors as large as the logits, not nine."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, logq: Tensor, formula: Formula) -> Tensor:
        value, gradient = formula(logq, log_probs(logits))
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][..., None]).to(ctx.dtype), None, None


def _against(teacher_logits: Tensor, logits: Tensor, formula: Formula) -> Tensor:
    logq = log_probs(teacher_logits.detach())
    del teacher_logits  # the caller's last reference, if it likes: as large as the student's
    return _Closed.apply(logits, logq, formula)


def _reverse_kl(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    return _about_mean(_weigh(logp, torch.sub(logp, logq, out=logq)), logp)


def _forward_kl(logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    terms = _weigh(logq, logq - logp)
    return terms.sum(-1), logp.exp_().sub_(logq)


def _jsd(logq: Tensor, logp: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
    from_teacher = _weigh(logq, logq - logm).sum(-1)
    from_student, gradient = _about_mean(_weigh(logp, logp - logm), logp)
    return beta * from_teacher + (1 - beta) * from_student, gradient.mul_(1 - beta)


def _weigh(logw: Tensor, gap: Tensor) -> Tensor:
    """`w gap` into `gap`, 0 where w is 0, whatever the gap is there; `logw` becomes w."""
    nothing = logw == -torch.inf
    weight = logw.exp_()
    return gap.mul_(weight).masked_fill_(nothing, 0.0)


def _about_mean(terms: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """(`sum_v p g`, `p (g - sum_v p g)`) of terms `p g`, which become the latter."""
    value = terms.sum(-1)
    return value, terms.addcmul_(p, value[..., None], value=-1)


def _same_width(teacher_logits: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    width = min(teacher_logits.shape[-1], logits.shape[-1])
    return teacher_logits[..., :width], logits[..., :width]
