"""Likelihood of tokens, and entropy.

Reductions over the vocabulary are in fp32, or in fp64 where the logits are: in bf16 the KL of two equal distributions is
not zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_probs(logits: Tensor) -> Tensor:
    """`log softmax(logits)` in nats, fp32 or fp64: [..., V] -> [..., V]."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def logp_at(logits: Tensor, ids: Tensor) -> Tensor:
    """`log softmax(logits)` in nats at some ids of each position: [..., V], [..., K] -> [..., K]."""
    return _LogpAt.apply(logits, ids)


def token_logp(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)[target]` in nats: [..., V], [...] -> [...]."""
    return logp_at(logits, targets[..., None])[..., 0]


def token_nll(logp: Tensor, coefficient: Tensor) -> Tensor:
    """`- sum_t coefficient_t log p_t`, a scalar: the value term of every method.

    Source: arXiv 2606.01476 for weights [second-hand]; policy gradient with advantage `coefficient` otherwise. The
    coefficient is detached, since a gradient through it would train the student to please its own judge.

    Args:
        logp: [R], nats, with gradient.
        coefficient: [R], weight or advantage times the reduction's scale; 0 outside the mask.
    """
    return -(coefficient.detach() * logp).sum()


def importance_ratio(logp: Tensor, logp_then: Tensor) -> Tensor:
    """`p_now(y) / p_then(y)` of sampled tokens: [...], [...] -> [...], nats in, without gradient.

    `E_{y ~ p_then}[(p_now / p_then) f(y)] = E_{y ~ p_now}[f(y)]`: coefficients of -log p times the ratio make samples of
    older weights stand for samples of the present ones. Token by token, as in PPO and IMPALA (arXiv 1802.01561 [paper]), it
    leaves out the ratio of what was written before. Truncated from above (the caller's `clamp`) it has less variance and a
    bias; not truncated, training diverges at a lag of 3 (arXiv 2606.24143 [paper], trap S2).
    """
    return (logp.detach() - logp_then).exp()


def entropy(logits: Tensor) -> Tensor:
    """`H = - sum_v p(v) log p(v)`, exact, in nats: [..., V] -> [...]."""
    logp = log_probs(logits)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


class _LogpAt(torch.autograd.Function):
    """`d log p(i) / d logits = onehot(i) - p`, written into one tensor as large as the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        logp = log_probs(logits)
        ctx.save_for_backward(logp, ids)
        ctx.dtype = logits.dtype
        return logp.gather(-1, ids)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        logp, ids = ctx.saved_tensors
        (g,) = upstream
        gradient = logp.exp().mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, ids, g)
        return gradient.to(ctx.dtype), None
