"""The teacher's whole next-token distributions, made from its hidden states slice by slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omniopd.losses.divergence import Divergence
from omniopd.losses.subset import full_divergence
from omniopd.types import Distributions


class FullTarget:
    """`KL(p || q)`, `KL(q || p)` or the generalised JSD at every position of a response, over the whole vocabulary.

    Position t is held against row t of the distributions: both sides have the same tokens, and ids past the narrower of two
    padded vocabularies are left out (trap R12). The teacher's logits are made on its own device and moved. Where they are
    no distribution (all -inf, or nan) the divergence is 0, without gradient.
    """

    blocks: Sequence[tuple[int, int]] = ()

    def __init__(self, distributions: Distributions, divergence: Divergence = "reverse", beta: float = 0.5) -> None:
        """`beta` is the teacher's share of the JSD's mixture; see `generalised_jsd`."""
        self.distributions, self.kind, self.beta = distributions, divergence, beta

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        """See `Target`."""
        silent = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        value = full_divergence(self._teacher(logits, start, silent), logits, self.kind, self.beta)
        return value.masked_fill(silent, 0.0)

    def _teacher(self, logits: Tensor, start: int, silent: Tensor) -> Tensor:
        """The teacher's logits; rows that are no distribution are noted in `silent`."""
        teacher = logits_at(self.distributions, start, logits)
        silent |= ~teacher.amax(-1).isfinite()
        return teacher.masked_fill(silent[:, None], 0.0) if bool(silent.any()) else teacher


@torch.no_grad()
def logits_at(distributions: Distributions, start: int, like: Tensor) -> Tensor:
    """The teacher's logits [r, V] at positions start to start + r, r being the length of `like`, on its device.

    Raises:
        ValueError: there are fewer rows than positions.
    """
    hidden = distributions.hidden[start : start + len(like)]
    if len(hidden) != len(like):
        raise ValueError(
            f"the teacher gave {len(distributions.hidden)} distributions, position {start + len(like) - 1} is asked for"
        )
    return distributions.head(hidden).to(like.device)
