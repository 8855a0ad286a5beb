"""Rollouts: the student's own words with their log-probs and entropies. What writes them is a sampler, see `samplers/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from omniopd.sampling import Draw
from omniopd.types import Author, Prompt, Rollout
from omniopd.verification.text import char_ends
from students.gap import Gap
from students.policy import Policy
from students.ranks import Ranks
from students.scoring import score

Ended = Callable[[int, Rollout], None]
"""Hears of the rollout of the i-th prompt as soon as it has ended."""


class Sampler(ABC):
    """Samples from the policy at temperature 1, top-p 1: anything else breaks the gradient's identity.

    Attributes:
        version: how many updates the sampler's weights have seen.
        gap: how far the sampler's log-probs were from the trainer's when they were last compared; None where both have
            the same weights in the same code.
        entropies: whether whoever hears of a rollout looks at its entropies; if not, they may be nan, unknown, where they
            would have to be computed apart.
        ranks: the processes of the run; None where it has one.
    """

    version: int = 0
    gap: Gap | None = None
    entropies: bool = True
    ranks: Ranks | None = None

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy, self.seed = policy, seed

    @abstractmethod
    def sample(
        self, prompts: Sequence[Prompt], step: int, rows: Sequence[int] | None = None, ended: Ended | None = None
    ) -> list[Rollout]:
        """One rollout per prompt. Row r of step s draws from a stream named by (seed, s, r).

        Args:
            rows: the prompts' places in the whole step; 0, 1, ... unless given.
            ended: hears of each rollout as it ends.
        """

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
        ids, _ = self.policy.encode(text)
        prompt_ids, ids = self.policy.prompt_ids(prompt), [*ids, self.policy.end_id]
        ((logprobs, entropy),) = score(self.policy, [(prompt_ids, ids)])
        return self._rollout(prompt, prompt_ids, Draw(tuple(ids), logprobs, entropy, "stop"), author="mixed")

    def _rollout(self, prompt: Prompt, prompt_ids: tuple[int, ...], draw: Draw, author: Author = "student") -> Rollout:
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
        )
