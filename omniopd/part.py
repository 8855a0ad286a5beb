"""What a part is: one change to how evidence becomes a loss. Methods are recipes of parts, and any two can be joined.

A part is one file in `omniopd/parts/`: a class registered under its name, with a `Config` and a `place` in the fixed order
of composition. A setting that changes nothing is `neutral`: such a part is left out, not multiplied with 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar

from omniopd.draft import Draft
from omniopd.method import Check, Facts, Gradients, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.settings import Settings
from omniopd.types import Evidence, Prompt, Query, Rollout, Signal, TokenScores, Writing


class Place(IntEnum):
    """Where a part acts; parts of one place act in the order of their names.

    What a later place counts (a quantile, a mean, a number of tokens), it counts over what earlier ones have left.
    """

    SAMPLE = 1  # how rollouts come to be: their length, teacher's text in them, the sampler
    CUT = 2  # where a rollout ends for the update
    ROUTE = 3  # which rollouts learn from what, and with which weight in their group
    DROP = 4  # which rollouts are left out
    MASK = 5  # which tokens are left out
    WEIGHT = 6  # soft weights of tokens
    TRANSFORM = 7  # the advantage as a function of the log-ratio
    BONUS = 8  # what is added to the advantage
    TERM = 9  # further terms of the loss


class PartSettings(Settings):
    """Base of the parts' settings."""

    @property
    def neutral(self) -> bool:
        """Whether these settings change nothing."""
        return False


class Part:
    """One change to plain distillation. Hooks have the meaning that they have in `Method`; most parts fill two or three.

    Attributes:
        slots: which slots of the step it fills, in the words of docs/architecture.md.
        place: where it acts among others.
        decides: whether it chooses among tokens or rollouts, so that `control: shuffled` has something to deal out.
        needs, writes, candidates, keeps_initial, one_process: as in `Method`.
        reads_entropy: whether it looks at the rollout's entropies, in `ask` or later.
        top: so many of the teacher's likeliest tokens at each place; 0: none.
        whole: the teacher's whole distributions.
        dense: whether it makes sense where the teacher's distributions are a divergence, not an advantage.
        spares_right: whether the teacher is not asked about rollouts that the verifier finds right.
        refuses: parts that it can't be joined with, and a sentence with the mend.
        warns: parts that it should not be joined with unawares, and why.
        neutral: settings that change nothing, for the tests of all parts; or a sentence that says why there are none.
    """

    Config: ClassVar[type[PartSettings]]
    slots: ClassVar[tuple[str, ...]]
    place: ClassVar[Place]
    decides: ClassVar[bool] = True
    needs: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    candidates: int = 0
    reads_entropy: bool = False
    spares_right: bool = False
    keeps_initial: bool = False
    one_process: bool = False
    top: int = 0
    whole: bool = False
    dense: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {}
    warns: ClassVar[Mapping[str, str]] = {}
    neutral: ClassVar[Mapping[str, Any] | str]
    check: Check | None = None

    def __init__(self, config: Any, objective: Objective, text: StudentText, seed: int) -> None:
        """`objective` are the settings of the method that it is part of."""
        self.config, self.objective, self.text, self.seed = config, objective, text, seed

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        return []

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        return {}

    def budget(self, step: int) -> float:
        return 0.0

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """Queries `by` this part, beside the one for scores that is made of all parts' `top` and `whole`."""
        return []

    def again(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int) -> list[Query]:
        return []

    def measure(self, rollout: Rollout, scores: TokenScores | None, student: StudentModel) -> Facts:
        """Numbers [T] of one rollout; names begin with the part's."""
        return {}

    def apply(self, draft: Draft) -> None:
        """Change the signal in the making."""

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def cautions(self) -> list[str]:
        return []
