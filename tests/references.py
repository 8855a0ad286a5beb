"""Plain on-policy distillation in its two forms, ten lines each: what every method's neutral setting must equal with `==`.

Both take log-probs and masks of a whole step and multiply by `1 / N` where the update does, so that no bit differs.
"""

from __future__ import annotations

from torch import Tensor


def opd_sampled(logp: Tensor, old_logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> Tensor:
    """`- mean_t sg(u_t - s_t) log p_t(y_t)` over the mask; all [T].

    Args:
        logp: the student's, with gradient.
        old_logp, teacher_logp: s and u of the sampled tokens, in float64: the difference is rounded once.
    """
    advantage = (teacher_logp - old_logp).float().where(mask, 0.0)
    scale = 1 / int(mask.sum())
    return -((advantage * scale) * logp).sum()


def opd_dense(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """`mean_t sum_v p_t(v) (log p_t(v) - log q_t(v))` over the mask: [T, V], [T, V], [T].

    Args:
        student_logits: with gradient.
    """
    logp, logq = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    divergence = (logp.exp() * (logp - logq)).sum(-1)
    scale = 1 / int(mask.sum())
    return (divergence * mask * scale).sum()
