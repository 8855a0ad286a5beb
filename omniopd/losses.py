"""The objective's pure functions: likelihood and divergence of logits, and how terms are averaged.

Reductions over the vocabulary are in fp32 or wider: in bf16 the KL of two equal distributions is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from omniopd.objective import Reduction

Head = Callable[[Tensor], Tensor]
"""Hidden states [R, D] to logits [R, V]."""


def token_logp(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)[target]` in nats: [..., V], [...] -> [...]."""
    return _logp(logits).gather(-1, targets[..., None])[..., 0]


def token_nll(logp: Tensor, coefficient: Tensor) -> Tensor:
    """`- sum_t coefficient_t log p_t`, a scalar: the value term of every method.

    Source: arXiv 2606.01476 for weights [second-hand]; policy gradient with advantage `coefficient` otherwise. The
    coefficient is detached, since a gradient through it would train the student to please its own judge.

    Args:
        logp: [R], nats, with gradient.
        coefficient: [R], weight or advantage times the reduction's scale; 0 outside the mask.
    """
    return -(coefficient.detach() * logp).sum()


def forward_kl(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """`KL(ref || student) = sum_v ref(v) (log ref(v) - log student(v))`, exact, in nats: [..., V] -> [...].

    The anchor of arXiv 2606.01476 [second-hand]. Its gradient on the student's logits is `student - ref`. Entries to
    which the reference gives no probability (padded vocabulary) add nothing.
    """
    ref_logp = _logp(ref_logits).detach()
    gap = (ref_logp - _logp(logits)).masked_fill(ref_logp == -torch.inf, 0.0)
    return (ref_logp.exp() * gap).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """`H = - sum_v p(v) log p(v)`, exact, in nats: [..., V] -> [...]."""
    logp = _logp(logits)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def chunked_logp_and_kl(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    ref_hidden: Tensor | None = None,
    ref_head: Head | None = None,
    slice_size: int = 1024,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets and, with a reference, `KL(ref || student)`, position by position: [R] and [R] or None.

    Logits are made for `slice_size` positions at a time and made again on the way back, so that no [R, V] tensor is
    stored. Values and gradients are those of `token_logp` and `forward_kl` on the whole.

    Args:
        hidden: [R, D], the student's last hidden states, with gradient.
        head: the student's output layer.
        targets: [R], ids.
        ref_hidden: [R, E], the reference's; E may differ from D.
        ref_head: the reference's output layer, over the same vocabulary.
    """
    rows = len(hidden)
    if len(targets) != rows or (ref_hidden is not None and len(ref_hidden) != rows):
        raise ValueError("hidden, targets and ref_hidden must have one row per position")
    if (ref_hidden is None) != (ref_head is None):
        raise ValueError("ref_hidden and ref_head come together")
    logps, kls = [], []
    for at in (slice(start, start + slice_size) for start in range(0, max(rows, 1), slice_size)):
        ref = None if ref_hidden is None else ref_hidden[at].detach()
        logp, kl = checkpoint(_slice, hidden[at], head, targets[at], ref, ref_head, use_reentrant=False)
        logps.append(logp)
        kls.append(kl)
    return torch.cat(logps), None if ref_hidden is None else torch.cat(kls)


def reduction_scales(
    mode: Reduction, audited: int, unaudited: int, sequences: int, response_tokens: int | None = None
) -> tuple[float, float]:
    """(scale of the value term's sum, scale of the KL term's sum); the loss is `a * values + beta * b * KLs`. [ours]

    - `term_mean`: `1 / audited`, `1 / unaudited`
    - `token_mean`: both `1 / response_tokens`
    - `sum_seqmean`: both `1 / sequences`, as arXiv 2606.01476 is re-implemented [second-hand]

    Counts are those of the whole optimizer step, over micro-batches and processes: a micro-batch multiplies its sums by
    the scales, and however the step is split it adds up to one loss. A term without tokens gets scale 0.

    Args:
        unaudited: tokens under the KL.
        response_tokens: `audited + unaudited` unless given; give it where the KL covers audited tokens too.
    """
    if mode == "term_mean":
        return _inverse(audited), _inverse(unaudited)
    if mode == "sum_seqmean":
        return _inverse(sequences), _inverse(sequences)
    scale = _inverse(audited + unaudited if response_tokens is None else response_tokens)
    return scale, scale


def _slice(
    hidden: Tensor, head: Head, targets: Tensor, ref_hidden: Tensor | None, ref_head: Head | None
) -> tuple[Tensor, Tensor | None]:
    logits = head(hidden)
    logp = token_logp(logits, targets)
    if ref_hidden is None or ref_head is None:
        return logp, None
    with torch.no_grad():
        ref_logits = ref_head(ref_hidden)
    return logp, forward_kl(ref_logits, logits)


def _logp(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _inverse(count: int) -> float:
    return 1.0 / count if count else 0.0
