"""The student's weights as methods may read them: `omniopd.method.StudentModel`."""

from __future__ import annotations

from collections.abc import Sequence

from omniopd.types import Distributions, Rollout
from students.policy import Policy
from students.scoring import Text, score, states


class StudentView:
    """Reads the policy's present weights, a forward pass for each question."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def distributions(self, rollouts: Sequence[Rollout]) -> list[Distributions]:
        """See `StudentModel`; they can be read until the update."""
        return states(self._policy, _texts(rollouts))

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """See `StudentModel`."""
        return [logprobs for logprobs, _ in score(self._policy, _texts(rollouts))]

    def initial_logprobs(self, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """See `StudentModel`."""
        with self._policy.reference() as initial:
            return [logprobs for logprobs, _ in score(self._policy, _texts(rollouts), initial)]


def _texts(rollouts: Sequence[Rollout]) -> list[Text]:
    return [(rollout.prompt_ids, rollout.ids) for rollout in rollouts]
