"""GOLD's target: groups of tokens that spell the same bytes on both sides, one divergence for each group.

Source: the "bayesian" merge of TRL's GOLD trainer [official code]. Its default, "observed", takes the first row's whole
distribution times the probabilities of the later tokens, which is no joint probability but for one entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from omniopd.alignment import AlignedChunk
from omniopd.losses.cross_tokenizer import bayesian_merge, gold_divergence
from omniopd.losses.likelihood import log_probs
from omniopd.targets.rows import spread, teacher_logits
from omniopd.types import Distributions
from omniopd.vocabulary_map import VocabularyMap


class GroupTarget:
    """`gold_divergence` of each group at its last position; every other position gets 0.

    The groups are `blocks`, since the probability of a group's earlier tokens carries gradient, too.
    """

    def __init__(
        self,
        groups: Sequence[AlignedChunk],
        teacher_ids: Sequence[int],
        distributions: Distributions,
        words: VocabularyMap,
        beta: float = 0.5,
        matched_weight: float | None = None,
    ) -> None:
        """`teacher_ids` [n] are what the teacher scored; `distributions` what it gave at each of their places."""
        self.groups, self.teacher_ids, self.distributions = tuple(groups), tuple(teacher_ids), distributions
        self.words, self.beta, self.matched_weight = words, beta, matched_weight
        self.blocks: Sequence[tuple[int, int]] = [(group.start, group.end) for group in self.groups]

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        """See `Target`."""
        here = [group for group in self.groups if start <= group.start and group.end <= start + len(logits)]
        if not here:
            return spread([], None, logits)
        own = bayesian_merge(log_probs(logits), ids, [(group.start - start, group.end - start) for group in here])
        matched = self.words.matched.to(logits.device)
        values = gold_divergence(own, self.merged(here, logits), matched, self.beta, self.matched_weight)
        return spread([group.end - 1 - start for group in here], values, logits)

    @torch.no_grad()
    def merged(self, groups: Sequence[AlignedChunk], like: Tensor) -> Tensor:
        """The teacher's merged log-probs of some groups, [g, W]."""
        rows = [row for group in groups for row in range(group.teacher_start, group.teacher_end)]
        ends = accumulate((group.teacher_end - group.teacher_start for group in groups), initial=0)
        logp = log_probs(teacher_logits(self.distributions, rows, self.words.size, like))
        ids = torch.tensor([self.teacher_ids[row] for row in rows], device=like.device)
        return bayesian_merge(logp, ids, list(pairwise(ends)))
