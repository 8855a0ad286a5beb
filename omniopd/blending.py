"""Sampling from a blend of student and teacher: as near to the teacher as a small KL from the student allows.

    mu* = argmin_mu KL(mu || T)  subject to  KL(mu || S) <= eps
        = mu_beta,  mu_beta(a) ~ S(a)^(1 - beta) T(a)^beta,  beta* = max {beta in [0, 1] : KL(mu_beta || S) <= eps}

With r = log T - log S, `d/dbeta KL(mu_beta || S) = beta Var_mu_beta[r] >= 0`, so that bisection finds it.

Source: TRB, arXiv 2605.31159 [paper]; the bisection and one event for all ends of a text [ours].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omniopd.decoding import Decoding
from omniopd.types import Prompt, Teacher

HALVINGS = 30  # of [0, 1]: beta to a billionth

# Facts of each token of a blended rollout, besides its `logprobs`, which are log mu (`omniopd.types.Rollout.facts`).
STUDENT = "behaviour_blend.student"  # log S of the token
BETA = "behaviour_blend.beta"
SPENT = "behaviour_blend.spent"  # KL(mu || S)
LEFT = "behaviour_blend.left"  # KL(mu || T)


@dataclass(frozen=True)
class Guide:
    """A teacher's weights as a sampler needs them.

    Attributes:
        end_ids: ids with which it ends a response.
        prompt_ids: the prompt as the teacher reads it, ready for the answer.
        turn: held while the weights compute: the teacher's own thread may have scores to make.
        context: tokens that prompt and response may have together.
    """

    model: PreTrainedModel
    end_ids: frozenset[int]
    prompt_ids: Callable[[Prompt], tuple[int, ...]]
    turn: AbstractContextManager[object]
    context: int = 1 << 30


@dataclass(frozen=True)
class Blend:
    """A teacher of the same vocabulary that may bend the student's next-token distribution by `budget` nats of KL.

    `end_id` is the student's that stands for every end of a text.
    """

    guide: Guide
    budget: float
    end_id: int

    @classmethod
    def of(cls, teacher: Teacher, budget: float, end_id: int) -> Blend | None:
        """The blend with a teacher that offers its weights ("decode"); None where there is nothing to spend."""
        return cls(teacher.guide, budget, end_id) if budget > 0 else None  # type: ignore[attr-defined]


class Blended:
    """A student and a teacher at work on the same rows; stands for the student's `Decoding`.

    Both step with their own past; `logits` [R, V] are log mu. Ids past the narrower of two padded vocabularies are left out
    (trap R12), and whatever ends a text for either side is one event.
    """

    def __init__(self, student: Decoding, teacher: Decoding, blend: Blend, end_ids: Collection[int]) -> None:
        """`end_ids` are the student's."""
        self._student, self._teacher, self._blend = student, teacher, blend
        width = min(student.logits.shape[-1], teacher.logits.shape[-1])
        ends = [blend.end_id, *sorted(({*end_ids} | blend.guide.end_ids) - {blend.end_id})]
        self._width, self._ends = width, [id for id in ends if id < width]
        self._bend()

    def facts(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """See `Decoding`."""
        return {
            STUDENT: self._logs.gather(1, tokens[:, None])[:, 0],
            BETA: self._beta,
            SPENT: kl(self.logits, self._logs),
            LEFT: kl(self.logits, self._logt),
        }

    def step(self, tokens: Tensor, kept: Sequence[int] | None) -> None:
        """See `Decoding`."""
        self._student.step(tokens, kept)
        with torch.autocast(self._teacher.model.device.type, enabled=False):  # that is the student's
            self._teacher.step(tokens, kept)
        self._bend()

    def _bend(self) -> None:
        student, teacher = self._student.logits, self._teacher.logits.to(self._student.logits.device)
        self._logs, self._logt = (
            one_stop(logits[:, : self._width].log_softmax(-1), self._ends) for logits in (student, teacher)
        )
        self.logits, self._beta = trb_mix(self._logs, self._logt, self._blend.budget)


def trb_mix(logs: Tensor, logt: Tensor, eps: float, halvings: int = HALVINGS) -> tuple[Tensor, Tensor]:
    """`log mu*` [..., V] and `beta*` [...]; computed in the dtype given, fp32 or better.

    The lower end of the bisection is always feasible, so that KL(mu* || S) <= eps but for rounding. What one side gives no
    probability has none in the blend, where beta is neither 0 nor 1.

    Args:
        logs: log-probs of the student, -inf where it gives none.
        logt: those of the teacher.
        eps: the budget in nats; with 0 the student's own tensor comes back.
    """
    low = torch.zeros(logs.shape[:-1], dtype=logs.dtype, device=logs.device)
    if eps <= 0:
        return logs, low
    shared = logs.isfinite() & logt.isfinite()
    ratio = (logt - logs).where(shared, 0.0)
    base = logs.masked_fill(~shared, -torch.inf)
    whole = kl(logt, logs) <= eps  # the teacher itself is near enough
    high = torch.ones_like(low)
    for _ in range(halvings):
        middle = (low + high) / 2
        fits = _spent(base, ratio, middle) <= eps  # nan, where nothing is shared, is not
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    mixed = (base + low[..., None] * ratio).log_softmax(-1)
    mixed = mixed.where(low[..., None] > 0, logs).where(~whole[..., None], logt)
    return mixed, low.where(~whole, 1.0)


def _spent(base: Tensor, ratio: Tensor, beta: Tensor) -> Tensor:
    """KL(mu_beta || S) [...] = beta E_mu[r] - log Z, where `base` is log S on the shared ids and `ratio` is r there."""
    bent = base + beta[..., None] * ratio
    normaliser = bent.logsumexp(-1)
    mean = ((bent - normaliser[..., None]).exp() * ratio).sum(-1)
    return beta * mean - normaliser


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) [...] in nats of log-probs [..., V]; inf where p has probability and q has none."""
    return (logp.exp() * (logp - logq)).where(logp.isfinite(), 0.0).sum(-1)


def one_stop(logp: Tensor, ends: Sequence[int]) -> Tensor:
    """Log-probs [..., V] with the probability of all `ends` moved to the first of them."""
    if len(ends) < 2:
        return logp
    at = torch.tensor(ends, device=logp.device)
    moved = logp.index_fill(-1, at, -torch.inf)
    moved[..., ends[0]] = logp.index_select(-1, at).logsumexp(-1)
    return moved
