"""The teacher's next-token distributions on a few ids of each position.

`observed` adds up what the losses' `SubsetStats` say of all positions asked about (`omniopd.types.Observing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from omniopd.losses.divergence import Divergence
from omniopd.losses.likelihood import logp_at
from omniopd.losses.subset import Mode, SubsetStats, common, subset_divergence
from omniopd.targets.full import logits_at
from omniopd.types import Distributions

Support = Literal["student", "teacher", "common"]


class SubsetTarget:
    """`subset_divergence` on the k likeliest ids of the student, the teacher, or both, of a teacher known in full.

    The student's are those of the weights that are being updated: after several updates on one batch they need not be those
    of its rollout any more. Both sides are cut to the narrower of two padded vocabularies (trap R12).
    """

    blocks: Sequence[tuple[int, int]] = ()

    def __init__(
        self,
        distributions: Distributions,
        k: int,
        support: Support = "student",
        mode: Mode = "tail_bucket",
        divergence: Divergence = "reverse",
        beta: float = 0.5,
    ) -> None:
        self.distributions, self.k, self.support = distributions, k, support
        self.mode, self.kind, self.beta = mode, divergence, beta
        self.observed: dict[str, float] = {}

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        """See `Target`."""
        teacher = logits_at(self.distributions, start, logits)
        width = min(teacher.shape[-1], logits.shape[-1])
        teacher, logits = teacher[:, :width], logits[:, :width]
        k = min(self.k, width)
        chosen = (teacher if self.support == "teacher" else logits.detach()).topk(k).indices
        logq = logp_at(teacher, chosen)
        if self.support == "common":
            logq = common(chosen, logq, teacher.topk(k).indices)
        value, stats = subset_divergence(logits, chosen, logq, self.mode, self.kind, self.beta)
        observe(self.observed, stats)
        return value


class TopKTarget:
    """`subset_divergence` on the ids that a server named at each position: as many as it named, none included.

    A position where it named none gets 0, without gradient.
    """

    blocks: Sequence[tuple[int, int]] = ()

    def __init__(
        self,
        top: Sequence[Mapping[int, float]],
        mode: Mode = "tail_bucket",
        divergence: Divergence = "reverse",
        beta: float = 0.5,
    ) -> None:
        """`top` [T] has the log-prob of each id, nats at temperature 1; a nan is a hole, as if the id had not been named."""
        self.mode, self.kind, self.beta = mode, divergence, beta
        width = max((len(named) for named in top), default=0)
        rows = [[*named.items(), *[(0, torch.nan)] * (width - len(named))] for named in top]
        self.ids = torch.tensor([[id for id, _ in row] for row in rows], dtype=torch.long).view(len(top), width)
        self.logq = torch.tensor([[lp for _, lp in row] for row in rows], dtype=torch.float64).view(len(top), width)
        self.observed: dict[str, float] = {}

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        """See `Target`.

        Raises:
            ValueError: the teacher named an id that the student's output layer does not have (trap R12).
        """
        here = slice(start, start + len(logits))
        chosen, logq = self.ids[here], self.logq[here]
        if chosen.numel() and int(chosen.max()) >= logits.shape[-1]:
            raise ValueError(f"the teacher named id {int(chosen.max())}, the student has {logits.shape[-1]}")
        value, stats = subset_divergence(
            logits, chosen.to(logits.device), logq.to(logits.device), self.mode, self.kind, self.beta
        )
        observe(self.observed, stats)
        return value


def observe(observed: dict[str, float], stats: SubsetStats) -> None:
    """Add what a slice's positions hold to the sums."""
    found = {
        "positions": float(stats.dead.numel()),
        "dead": float(stats.dead.sum()),
        "student_mass": float(stats.student_mass.sum()),
        "teacher_mass": float(stats.teacher_mass.sum()),
    }
    for name, amount in found.items():
        observed[name] = observed.get(name, 0.0) + amount
