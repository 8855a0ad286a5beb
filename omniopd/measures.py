"""Numbers of next-token distributions, slice by slice, so that no [T, V] tensor is ever stored. In nats, float64 out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from omniopd.losses import slice_bounds, slice_size
from omniopd.types import Distributions, Target


def entropies(distributions: Distributions) -> Tensor:
    """Entropy [T], exact over the vocabulary."""
    parts = [-(logp.exp() * logp).nan_to_num(0.0).sum(-1) for logp in log_probs(distributions)]
    return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.float64)


def entropies_of_top(top: Sequence[Mapping[int, float]]) -> Tensor:
    """Entropy [T] of the likeliest tokens and one bucket for all others: never more than that of the whole distribution."""
    return torch.tensor([_bucketed_entropy(list(known.values())) for known in top], dtype=torch.float64)


def _bucketed_entropy(logprobs: Sequence[float]) -> float:
    logp = torch.tensor(logprobs, dtype=torch.float64)
    rest = (1 - logp.exp().sum()).clamp(min=0)
    return float(-(logp.exp() * logp).nan_to_num(0.0).sum() - torch.xlogy(rest, rest))


@torch.no_grad()
def divergences(student: Distributions, target: Target, ids: Sequence[int]) -> Tensor:
    """A target's divergence [T] of the student's distributions.

    Args:
        ids: [T], the tokens that were written there.
    """
    hidden, written = student.hidden, torch.tensor(ids, dtype=torch.long)
    if not len(hidden):
        return torch.zeros(0, dtype=torch.float64)
    width = student.head(hidden[:1]).shape[-1]
    bounds = slice_bounds(len(hidden), slice_size(width))
    parts = [target.divergence(student.head(hidden[at]), written[at].to(hidden.device), at.start) for at in bounds]
    return torch.cat(parts).double().cpu()


@torch.no_grad()
def log_probs(distributions: Distributions) -> Iterator[Tensor]:
    """Log-probs [r, V] in fp32, a slice of positions after the other."""
    hidden = distributions.hidden
    if not len(hidden):
        return
    width = distributions.head(hidden[:1]).shape[-1]
    for at in slice_bounds(len(hidden), slice_size(width)):
        yield distributions.head(hidden[at]).float().log_softmax(-1)


@torch.no_grad()
def pairs(student: Distributions, teacher: Distributions) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probs [r, V] of both at the same positions, ids past the narrower vocabulary left out of both (trap R12).

    Raises:
        ValueError: they have different numbers of positions.
    """
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(f"student has {len(student.hidden)} positions, teacher {len(teacher.hidden)}")
    if not len(student.hidden):
        return
    width = min(one.head(one.hidden[:1]).shape[-1] for one in (student, teacher))
    for at in slice_bounds(len(student.hidden), slice_size(width)):
        own = student.head(student.hidden[at])[:, :width].float().log_softmax(-1)
        theirs = teacher.head(teacher.hidden[at])[:, :width].float().log_softmax(-1)
        yield own, theirs.to(own.device)
