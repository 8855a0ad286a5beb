"""BPM (byte-prefix mapping, arXiv 2607.22334): a dense divergence to a teacher of another tokenizer, position by position.

Each teacher token counts for the longest student token that opens its bytes; what none opens is an explicit residual. The
mapping is `omniopd.vocabulary_map`, the places where a student position reads the teacher are `omniopd.targets.bpm`.

[second-hand] the mapping, places inside a teacher token, masked blanks, the end of the turn by role; [ours] direction and
treatment of the residual, the conditional distribution after a cut that the student did not make. With one tokenizer on both
sides this is the dense form of `opd`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.losses.divergence import Divergence
from omniopd.mapped import Laid, Mapped, MappedObjective
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.scored import Reading, likelihoods
from omniopd.targets.bpm import BytePrefixTarget, Place, places
from omniopd.targets.full import FullTarget
from omniopd.types import Capabilities, Target
from omniopd.vocabulary_map import NONE

BLANK, UNMAPPED = "blank", "unmapped"  # a token of white space; no student token opens what the teacher goes on with


class BpmConfig(MappedObjective):
    """How the mapped teacher and the student are compared, and where."""

    name: Literal["bpm"] = "bpm"
    divergence: Divergence = Field(
        default="forward",
        description="KL(teacher||student), KL(student||teacher), or beta KL(q||m) + (1 - beta) KL(p||m); reverse needs the "
        "student's own tokenizer",
    )
    beta: float = Field(default=0.5, gt=0, lt=1, description="jsd: the teacher's share of m")
    boundary: bool = Field(
        default=True,
        description="where the teacher's token could have been longer, what remains of the longer ones is part of the target "
        "[ours]; false takes its token at its word, as published",
    )
    mask_blanks: bool = Field(
        default=True,
        description="no signal where the student wrote only spaces or tabs, whose runs are a teacher's habit",
    )


@METHODS.register("bpm")
class Bpm(Mapped):
    """The teacher's distributions, mapped to the student's tokens."""

    Config: ClassVar[type[Objective]] = BpmConfig
    paper = "2607.22334"
    neutral: ClassVar = {"divergence": "reverse", "mask_blanks": False}
    plain: ClassVar = {"name": "opd", "form": "dense"}

    def __init__(self, config: BpmConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config

    def lacking(self, offered: Capabilities) -> list[str]:
        other = self.config.divergence == "reverse" and offered.vocabulary != self.text.vocabulary.digest
        reverse = "the student's tokenizer (method.divergence=reverse, infinite where nothing maps; jsd is not)"
        return [*super().lacking(offered), *([reverse] if other else [])]

    def cautions(self) -> list[str]:
        masked = self.config.mask_blanks
        blanks = (
            "method.mask_blanks=false: the student copies the teacher's white space; code pass@8 fell from 49% to 9%"
        )
        return [*super().cautions(), *([] if masked else [blanks])]

    def lay(self, laid: Laid) -> Reading:
        """A place for each token of the chunks, but for blanks."""
        found: list[Place | None] = [None] * len(laid.rollout)
        holes, exact, shorter = laid.holes.copy(), [], []
        for spelled in laid.heard:
            first = spelled.chunk.teacher_start
            there = places(spelled.student, spelled.teacher, first, self._bytes(laid, first - 1) if first else b"")
            if not self.config.boundary:
                there = [replace(place, before=b"") for place in there]
            for t, token, place in zip(count(spelled.chunk.start), spelled.student, there, strict=False):
                mapped = laid.words.student_of(laid.scores.ids[place.row], place.spelled)
                if self.config.mask_blanks and token and not token.strip(b" \t"):
                    holes[BLANK] += 1
                elif mapped == NONE:
                    holes[UNMAPPED] += 1
                else:
                    found[t] = place
                    exact.append(place.exact)
                    shorter.append(len(self.text.vocabulary.bytes_of[mapped]) < len(token))
        own, theirs = likelihoods(laid.rollout, laid.scores, [spelled.chunk for spelled in laid.heard])
        return Reading(
            mask=torch.tensor([place is not None for place in found], dtype=torch.bool),
            values=torch.zeros(len(found)),
            holes=holes,
            target=self._target(laid, found),
            log_ratios=theirs - own,
            figures={"exact_share": torch.tensor(exact).double(), "shorter_share": torch.tensor(shorter).double()},
        )

    @staticmethod
    def _bytes(laid: Laid, row: int) -> bytes:
        """What the teacher's token of a row spells."""
        assert laid.scores.vocabulary is not None  # see `Mapped.place`
        return laid.scores.vocabulary.bytes_of[laid.scores.ids[row]]

    def _target(self, laid: Laid, found: Sequence[Place | None]) -> Target:
        kind, beta = self.config.divergence, self.config.beta
        if laid.words.identity:
            return FullTarget(laid.distributions, kind, beta)
        return BytePrefixTarget(found, laid.distributions, laid.words, 0.0 if kind == "forward" else beta)
