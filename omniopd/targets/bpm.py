"""Byte-prefix mapping: a teacher of another tokenizer as a distribution over the student's tokens, position by position.

Where a student position lies in the teacher's tokens decides what is read (arXiv 2607.22334 [second-hand], the rest [ours]):

- at a boundary: the teacher's next-token distribution, mapped. If the token before it opens longer ones, their part comes
  from what remains of these: the student need not have known that the teacher would stop there (`omniopd.boundary`)
- inside a token, after the bytes r of it: the teacher's tokens that start with r, renormalised; what remains of each is
  mapped. Teacher tokens that are r itself go to the residual: what follows them was not asked, but it is none of these

The text before r counts as cut the way the teacher did cut it. Since the last boundary that both sides share, that cut has
the probability `product of its realised steps * mass of the tokens that start with r`: a lower bound of the bytes'
probability, in which other cuts have a part, too. A position is called exact where no realised step is in the product, so
that no token of the teacher had to end between that boundary and r. The product is one number for a whole row; in the
conditional distribution it cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from omniopd.losses.cross_tokenizer import mapped_divergence, mapped_mass
from omniopd.targets.rows import spread, teacher_logits
from omniopd.types import Distributions
from omniopd.vocabulary_map import VocabularyMap


@dataclass(frozen=True, slots=True)
class Place:
    """Where a student position reads the teacher: the row, and the bytes of that row's token that are already spelled.

    `exact` says that the chunk's bytes up to here are the opening of one teacher token. `before` is what the teacher's token
    in front of a boundary spells; b"" inside a token, and where there is none.
    """

    row: int
    spelled: bytes
    exact: bool
    before: bytes = b""


def places(student: Sequence[bytes], teacher: Sequence[bytes], first_row: int, before: bytes = b"") -> list[Place]:
    """Where each student position of a chunk reads the teacher.

    Args:
        student, teacher: what each token of the chunk spells on either side, the same in all.
        first_row: of the chunk's teacher tokens.
        before: what the teacher's token in front of the chunk spells.
    """
    starts = list(accumulate(map(len, teacher), initial=0))
    found, row, at = [], 0, 0
    for token in student:
        while row + 1 < len(teacher) and starts[row + 1] <= at:
            row += 1
        spelled = teacher[row][: at - starts[row]]
        front = teacher[row - 1] if row else before
        found.append(Place(first_row + row, spelled, exact=row == 0, before=b"" if spelled else front))
        at += len(token)
    return found


class BytePrefixTarget:
    """`mapped_divergence` from the teacher's mapped distributions; 0 where the teacher says nothing."""

    blocks: Sequence[tuple[int, int]] = ()

    def __init__(
        self,
        places: Sequence[Place | None],
        distributions: Distributions,
        words: VocabularyMap,
        beta: float = 0.0,
    ) -> None:
        """`places` [T] are None where the teacher says nothing."""
        self.places, self.distributions, self.words, self.beta = places, distributions, words, beta

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        """See `Target`."""
        here = [(i, place) for i, place in enumerate(self.places[start : start + len(logits)]) if place is not None]
        if not here:
            return spread([], None, logits)
        at = [i for i, _ in here]
        target, residual, image = self.mapped([place for _, place in here], logits)
        return spread(at, mapped_divergence(target, residual, logits[at], self.beta, image), logits)

    @torch.no_grad()
    def mapped(self, places: Sequence[Place], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the teacher gives each student token at these places, [r, V], the residual [r], and which student tokens can
        not be what the residual stands for, [r, V] bool.

        Inside a token these are all that what remains of longer ones maps to; at a boundary nothing is known.
        """
        target, residual, _, image = self._after([(place.row, place.spelled) for place in places], logits)
        opened = [i for i, place in enumerate(places) if place.before and len(self.words.after(place.before)[0]) > 1]
        if opened:
            longer, lost, ended, _ = self._after([(places[i].row - 1, places[i].before) for i in opened], logits)
            target[opened] = longer + ended[:, None] * target[opened]
            residual[opened] = lost - ended + ended * residual[opened]
        return target, residual, image

    def _after(self, read: Sequence[tuple[int, bytes]], logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row, once some bytes of its token are spelled: mapped mass, residual, the part of it that is the token of
        just these bytes, and the student tokens that are mapped to (all of them, where no byte is spelled)."""
        teacher = teacher_logits(self.distributions, [row for row, _ in read], self.words.size, logits)
        target, residual = teacher.new_zeros(len(teacher), logits.shape[-1]), teacher.new_zeros(len(teacher))
        ended, image = torch.zeros_like(residual), torch.ones_like(target, dtype=torch.bool)
        for spelled in dict.fromkeys(spelled for _, spelled in read):
            rows = [row for row, (_, own) in enumerate(read) if own == spelled]
            ids, students, over = (part.to(teacher.device) for part in self.words.after(spelled))
            open_ = teacher[rows][:, ids] if spelled else teacher[rows]
            target[rows], residual[rows] = mapped_mass(open_, students, logits.shape[-1])
            ended[rows] = (open_.softmax(-1) * over).sum(-1)
            if spelled:
                reached = students[(students >= 0) & (students < logits.shape[-1])]
                image[rows] = torch.zeros_like(image[0]).index_fill(0, reached, True)
        return target, residual, ended, image
