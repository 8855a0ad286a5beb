"""ULD's target: the sorted probabilities of both sides, position by position, whatever their tokens are.

Source: arXiv 2402.12030 [official code https://github.com/Nicolas-BZRD/llm-recipes]: position i of the student is held
against position i of the teacher, as far as the shorter side goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from omniopd.losses.cross_tokenizer import sorted_l1
from omniopd.losses.likelihood import log_probs
from omniopd.targets.rows import spread, teacher_logits
from omniopd.types import Distributions


class SortedTarget:
    """`weight * sorted_l1` of the student's and the teacher's probabilities; 0 past the teacher's last position."""

    blocks: Sequence[tuple[int, int]] = ()

    def __init__(self, distributions: Distributions, size: int, weight: float = 1.0) -> None:
        """`size` is the teacher's vocabulary without the padding of its output layer."""
        self.distributions, self.size, self.weight = distributions, size, weight

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        """See `Target`."""
        at = list(range(min(len(logits), len(self.distributions.hidden) - start)))
        if not at:
            return spread([], None, logits)
        teacher = teacher_logits(self.distributions, [start + i for i in at], self.size, logits)
        values = sorted_l1(log_probs(logits[: len(at)]).exp(), log_probs(teacher).exp())
        return spread(at, self.weight * values, logits)
