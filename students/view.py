"""The student's weights as methods may read them: `omniopd.method.StudentModel`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from omniopd.types import Distributions, Rollout
from students.discriminator import Discriminator
from students.policy import Policy
from students.scoring import Text, score, states


class StudentView:
    """Reads the policy's present weights; valid until the update.

    The first question about the distributions of any of `rollouts` is answered for all of them, in as few forward passes as
    their lengths allow: so parts may ask rollout by rollout. What is kept are last hidden states.
    """

    def __init__(self, policy: Policy, rollouts: Collection[Rollout] = ()) -> None:
        self._policy = policy
        self._expected = _texts(rollouts)
        self._known: dict[Text, Distributions] = {}

    def distributions(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        """See `StudentModel`."""
        texts = _texts(rollouts)
        if any(text not in self._known for text in texts):
            missing = [text for text in dict.fromkeys([*self._expected, *texts]) if text not in self._known]
            self._known |= zip(missing, states(self._policy, missing), strict=True)
        return [self._known[text] for text in texts]

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """See `StudentModel`."""
        return [logprobs for logprobs, _ in score(self._policy, _texts(rollouts))]

    def initial_logprobs(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """See `StudentModel`."""
        with self._policy.reference() as initial:
            return [logprobs for logprobs, _ in score(self._policy, _texts(rollouts), initial)]

    def discriminator(self, learning_rate: float, max_grad_norm: float, seed: int) -> Discriminator:
        """See `StudentModel`; it lives on, whatever becomes of the view."""
        return Discriminator(self._policy, learning_rate, max_grad_norm, seed)


def _texts(rollouts: Collection[Rollout]) -> list[Text]:
    return [(rollout.prompt_ids, rollout.ids) for rollout in rollouts]
