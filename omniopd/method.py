"""What a method is: it says where to ask the teacher, and turns what came back into numbers on tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Protocol

from omniopd.objective import Objective
from omniopd.types import Capabilities, Evidence, Query, Rollout, Signal
from omniopd.vocabulary import Vocabulary


class StudentText(Protocol):
    """The student's tokenizer, as methods need it."""

    end_ids: Collection[int]  # every id that ends a response
    end_id: int  # the one that a response is taught to end with
    vocabulary: Vocabulary

    def decode(self, ids: list[int]) -> str: ...

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of plain text, and each token's span of characters."""
        ...


class Method:
    """A recipe over the slots of the step. Subclasses are one file each in `omniopd/methods/`.

    Attributes:
        needs: what the teacher must offer: "continuation", "answer", "score", "topk", "logits", "same tokenizer".
        on_policy: whether the student writes rollouts; otherwise the method gets rollouts of no tokens.
        reads_entropy: whether `ask` looks at the rollout's entropies.
        min_coverage: several steps in a row with a smaller share of tokens that the teacher spoke about stop the run.
    """

    Config: ClassVar[type[Objective]]
    needs: frozenset[str]
    on_policy: ClassVar[bool] = True
    reads_entropy: bool = False
    min_coverage: float = 0.0

    def __init__(self, config: Objective, text: StudentText, seed: int) -> None:
        self.objective, self.text, self.seed = config, text, seed

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """What to ask the teacher about one rollout, the `row`-th of its step; asked as soon as the rollout ends."""
        raise NotImplementedError

    def audit(self, rollouts: Sequence[Rollout], step: int) -> list[Query]:
        """What to ask the teacher about all rollouts of a step."""
        return [query for row, rollout in enumerate(rollouts) for query in self.ask(rollout, row, step)]

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """Evidence as numbers on tokens. Pure: the same rollouts and evidence give the same signal."""
        raise NotImplementedError

    def describe(self) -> str:
        """What of the teacher it learns from, in a few words."""
        read = next((words for need, words in _READS.items() if need in self.needs), "nothing")
        if not self.needs & {"score", "topk", "logits"}:
            return read
        return f"{read}, {'token by token' if 'same tokenizer' in self.needs else 'aligned by bytes'}"

    def lacking(self, offered: Capabilities) -> list[str]:
        """What the method needs and a teacher does not offer, in a few words each."""
        return missing(self.needs, offered, self.text.vocabulary.digest)

    def cautions(self) -> list[str]:
        """Settings that are allowed but known to end badly, a sentence each."""
        if self.on_policy and self.objective.anchor.beta == 0:
            return [
                "method.anchor.beta=0: nothing holds what the teacher does not speak about; published runs collapsed"
            ]
        return []


_READS = {  # the richest first: where there are distributions, scores are there as well
    "logits": "whole distributions",
    "topk": "likeliest tokens of given text",
    "score": "scores of given text",
    "continuation": "continuations of the student's text",
    "answer": "the teacher's own answers",
}


def missing(needs: frozenset[str], offered: Capabilities, vocabulary: str = "") -> list[str]:
    """What a method needs and a teacher does not offer. `vocabulary` is the digest of the student's."""
    has = {
        "answer": offered.answer,
        "continuation": offered.continuation is not None,
        "score": offered.score,
        "topk": offered.topk > 0,
        "logits": offered.logits,
        "same tokenizer": bool(vocabulary) and offered.vocabulary == vocabulary,
    }
    return sorted(need for need in needs if not has.get(need, False))
