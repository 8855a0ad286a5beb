"""What a method is: it says where to ask the teacher, and turns what came back into numbers on tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from omniopd.objective import Objective
from omniopd.types import Capabilities, Distributions, Evidence, Metric, Prompt, Query, Rollout, Signal, Writing
from omniopd.vocabulary import Vocabulary

Facts = Mapping[str, Sequence[float]]
"""Numbers by name, each [T] of one rollout."""

Check = Callable[[Prompt, str], bool | None]
"""The task's verifier: whether a text answers the prompt rightly; None where it can't decide."""


class StudentText(Protocol):
    """The student's tokenizer, as methods need it, and the table behind its tokens."""

    end_ids: frozenset[int]  # every id that ends a response
    end_id: int  # the one that a response is taught to end with
    vocabulary: Vocabulary

    def decode(self, ids: list[int]) -> str: ...

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of plain text, and each token's span of characters."""
        ...

    def embeddings(self) -> Tensor:
        """A copy of the present input embeddings [V, E]; when a method is made, these are the initial student's."""
        ...


class StudentModel(Protocol):
    """The student's weights at the time of the update, as methods may read them."""

    def distributions(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        """Its next-token distributions at every token of each response."""
        ...

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """What it gives each token of each response, in nats."""
        ...

    def initial_logprobs(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """The same of the initial student; only for methods that `keep_initial`."""
        ...

    def discriminator(self, learning_rate: float, max_grad_norm: float, seed: int) -> Discriminator:
        """A network of its own that begins as a copy of these weights; the method keeps it, and its state."""
        ...


class Discriminator(Protocol):
    """D(x, y): one number for a whole text, given as prompt ids and response ids."""

    def values(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """D of each text, at the present weights."""
        ...

    def learn(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], slopes: Sequence[float]) -> float:
        """One step down the loss whose slopes in D of each text these are; the norm of its gradient."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Gradients(Protocol):
    """What the trainer tells of gradients, at the present weights."""

    def gram(
        self, rollouts: Sequence[Rollout], signals: Sequence[Signal], metric: Metric = "identity"
    ) -> list[list[float]]:
        """Inner products [K, K] of the gradients of K signals on the same rollouts, over all trained weights."""
        ...


class Method:
    """A recipe over the slots of the step. Subclasses are one file each in `omniopd/methods/`.

    Attributes:
        needs: what the run must offer. Of the teacher: "continuation", "answer", "score", "topk", "logits", "decode" (its
            weights beside the student's while that writes), "same tokenizer"; of the task: "verify"; a "group" of several
            rollouts per prompt; a "judge"; "fresh" rollouts, of the weights that learn from them.
        writes: what it asks of the sampler beside plain rollouts: "horizon", "text", "initial", "blend" (see `Writing`).
        on_policy: whether the student writes rollouts; otherwise the method gets rollouts of no tokens.
        reads_entropy: whether `ask` looks at the rollout's entropies.
        candidates: how many of the student's likeliest tokens at each place `ask` looks at.
        keeps_initial: whether the initial student is kept beside the present one.
        one_process: whether all rollouts must be in one process.
        decides: whether `control: shuffled` has something to deal out.
        min_coverage: several steps in a row with a smaller share of tokens that the teacher spoke about stop the run.
        paper: where the method was published.
        neutral: settings, with a name, that make it plain on-policy distillation to the last bit, and `plain` those of
            that; or a sentence that says why there are none.
    """

    Config: ClassVar[type[Objective]]
    needs: frozenset[str]
    writes: frozenset[str] = frozenset()
    on_policy: bool = True
    reads_entropy: bool = False
    candidates: int = 0
    keeps_initial: bool = False
    one_process: bool = False
    decides: bool = False
    min_coverage: float = 0.0
    check: Check | None = None  # of the run's task
    group: int = 1  # rollouts of each prompt: the rows of a step from one of its multiples up to the next
    paper: ClassVar[str] = ""
    neutral: ClassVar[Mapping[str, Any] | str] = ""
    plain: ClassVar[Mapping[str, Any]] = {"name": "opd"}

    def __init__(self, config: Objective, text: StudentText, seed: int) -> None:
        self.objective, self.text, self.seed = config, text, seed

    # ------------------------------------------------------------------ before the student writes

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        """What to ask the teacher before the student writes, by row; the evidence of the step begins with its answers."""
        return []

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        """How each row comes to be; rows that are left out are the student's own."""
        return {}

    def budget(self, step: int) -> float:
        """Nats by which the teacher may bend the student's distribution at each token while it writes ("blend")."""
        return 0.0

    # ------------------------------------------------------------------ evidence

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """What to ask the teacher about one rollout, the `row`-th of its step; asked as soon as the rollout ends."""
        raise NotImplementedError

    def again(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int) -> list[Query]:
        """What to ask once all of the evidence so far is there, round after round until there is nothing more."""
        return []

    def audit(self, rollouts: Sequence[Rollout], step: int) -> list[Query]:
        """What to ask the teacher about all rollouts of a step."""
        return [query for row, rollout in enumerate(rollouts) for query in self.ask(rollout, row, step)]

    # ------------------------------------------------------------------ reading

    @property
    def asks_again(self) -> bool:
        """Whether it may ask more than `before` and `ask` say."""
        return type(self).again is not Method.again

    @property
    def measures(self) -> bool:
        """Whether there is anything to `measure`, for which the student's weights must be whole."""
        return type(self).measure is not Method.measure

    def measure(
        self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], student: StudentModel
    ) -> Mapping[int, Facts]:
        """Numbers on tokens that need distributions, which stay in the process where a rollout was written.

        They reach `read` as `Rollout.facts`, those of all processes.
        """
        return {}

    def verdict(self, rollout: Rollout) -> bool | None:
        """Whether a rollout is right; None where its prompt has no reference, it was cut, or the verifier can't decide."""
        if self.check is None or rollout.prompt.reference is None or rollout.finish == "length":
            return None
        return self.check(rollout.prompt, rollout.text)

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """Evidence as numbers on tokens. The same rollouts, evidence and state give the same signal."""
        raise NotImplementedError

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        """The update is made: what the method changes for the next step, and figures for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""

    # ------------------------------------------------------------------ words

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
    "judge": "verdicts",
}

OF_THE_RUN = frozenset({"verify", "group", "judge", "fresh"})
"""Needs that no teacher meets: the run is asked for them when it is put together."""


def missing(needs: frozenset[str], offered: Capabilities, vocabulary: str = "") -> list[str]:
    """What a method needs and a teacher does not offer. `vocabulary` is the digest of the student's."""
    has = {
        "answer": offered.answer,
        "continuation": offered.continuation is not None,
        "score": offered.score,
        "topk": offered.topk > 0,
        "logits": offered.logits,
        "decode": offered.decode,
        "same tokenizer": bool(vocabulary) and offered.vocabulary == vocabulary,
    }
    return sorted(need for need in needs - OF_THE_RUN if not has.get(need, False))
