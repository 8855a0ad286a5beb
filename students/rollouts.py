"""Rollouts: the student's own words with their log-probs and entropies. What writes them is a sampler, see `samplers/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from omniopd.sampling import Blend, Draw
from omniopd.types import Author, Finish, Prompt, Rollout, Writing
from omniopd.verification.text import char_ends
from students.gap import Gap
from students.policy import Policy
from students.ranks import Ranks
from students.scoring import score

Ended = Callable[[int, Rollout], None]
"""Hears of the rollout of the i-th prompt, or of that row, as soon as it has ended."""

PLAIN = Writing()


class Sampler(ABC):
    """Samples from the policy at temperature 1, top-p 1: anything else breaks the gradient's identity.

    Attributes:
        version: how many updates the sampler's weights have seen.
        gap: how far the sampler's log-probs were from the trainer's when they were last compared; None where both have
            the same weights in the same code.
        entropies: whether whoever hears of a rollout looks at its entropies; if not, they may be nan, unknown, where they
            would have to be computed apart.
        ranks: the processes of the run; None where it has one.
        candidates: how many of the likeliest tokens at each place a rollout names (`Rollout.top`).
        offers: what it can do beside plain rollouts: see `Method.writes`; "candidates" if it names such tokens.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"horizon"})
    candidates: int = 0

    version: int = 0
    gap: Gap | None = None
    entropies: bool = True
    ranks: Ranks | None = None

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy, self.seed = policy, seed

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[Prompt],
        step: int,
        rows: Sequence[int] | None = None,
        ended: Ended | None = None,
        writings: Sequence[Writing] | None = None,
        blend: Blend | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt. Row r of step s draws from a stream named by (seed, s, r).

        Args:
            rows: the prompts' places in the whole step; 0, 1, ... unless given.
            ended: hears of each rollout as it ends.
            writings: how each comes to be; none `whole` or `blank`.
            blend: the teacher that bends the student's distribution, if one does.
        """

    def fill(
        self,
        prompts: Mapping[int, Prompt],
        step: int,
        ended: Ended,
        writings: Mapping[int, Writing],
        blend: Blend | None = None,
    ) -> None:
        """A rollout for each row, in the way that its `Writing` says; `ended` hears of each with its row."""
        blank = [row for row in prompts if writings.get(row, PLAIN).blank]
        for row, rollout in zip(blank, self.unwritten([prompts[row] for row in blank]), strict=True):
            ended(row, rollout)
        whole = [row for row in prompts if writings.get(row, PLAIN).whole]
        texts = [(prompts[row], writings[row].begins) for row in whole]
        for row, rollout in zip(whole, self.given_ids(texts), strict=True):
            ended(row, rollout)
        if free := [row for row in prompts if row not in {*blank, *whole}]:
            chosen = [writings.get(row, PLAIN) for row in free]
            own = [prompts[row] for row in free]
            self.sample(own, step, free, lambda place, rollout: ended(free[place], rollout), chosen, blend)

    @abstractmethod
    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The likeliest answers, for evaluation."""

    def push(self, version: int) -> None:
        """The policy's weights have changed and have now seen so many updates; what is written next comes from them."""
        self.version = version

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what was started."""

    def unwritten(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Rollouts of no tokens, for methods that learn from the teacher's answers alone."""
        return [
            Rollout(p, self.policy.prompt_ids(p), (), (), (), (), "", "length", version=self.version) for p in prompts
        ]

    def given(self, prompt: Prompt, text: str) -> Rollout:
        """A text that somebody else wrote, as if the student had: its own log-probs and entropies at every token."""
        ids = (*self.policy.encode(text)[0], self.policy.end_id)
        return self.given_ids([(prompt, ids)], "mixed")[0]

    def given_ids(self, texts: Sequence[tuple[Prompt, tuple[int, ...]]], author: Author = "teacher") -> list[Rollout]:
        """Whole responses [T] that somebody else wrote, with the student's log-probs and entropies."""
        prompt_ids = [self.policy.prompt_ids(prompt) for prompt, _ in texts]
        found = score(self.policy, [(before, ids) for before, (_, ids) in zip(prompt_ids, texts, strict=True)])
        rollouts = []
        for before, (prompt, ids), (logprobs, entropy) in zip(prompt_ids, texts, found, strict=True):
            finish: Finish = "stop" if ids and ids[-1] in self.policy.end_ids else "length"
            given = len(ids) if author == "teacher" else 0
            rollouts.append(self._rollout(prompt, before, Draw(ids, logprobs, entropy, finish), author, given))
        return rollouts

    def _rollout(
        self,
        prompt: Prompt,
        prompt_ids: tuple[int, ...],
        draw: Draw,
        author: Author = "student",
        given: int = 0,
    ) -> Rollout:
        return Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            ids=draw.ids,
            logprobs=draw.logprobs,
            entropy=draw.entropy,
            ends=tuple(char_ends(draw.ids, self.policy.decode)),
            text=self.policy.decode(list(draw.ids)),
            finish=draw.finish,
            author=author,
            version=self.version,
            given=given,
            facts=draw.facts,
            top=draw.top,
        )
