"""Rollouts by the policy itself, in this process: exact entropies, no weights to push. `student.rollouts: transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from omniopd.registry import SAMPLERS
from omniopd.sampling import Draw, Request, named_seed, sample
from omniopd.settings import Settings
from omniopd.types import Prompt, Rollout
from students.policy import Policy
from students.rollouts import Ended, Sampler


class TransformersRollouts(Settings):
    """Our own sampling loop over the model's forward pass."""

    type: Literal["transformers"] = "transformers"


@SAMPLERS.register("transformers")
class TransformersSampler(Sampler):
    """The embedded sampler."""

    Config = TransformersRollouts

    def __init__(self, config: TransformersRollouts, policy: Policy, seed: int) -> None:
        super().__init__(policy, seed)

    def sample(
        self, prompts: Sequence[Prompt], step: int, rows: Sequence[int] | None = None, ended: Ended | None = None
    ) -> list[Rollout]:
        """See `Sampler`."""
        rows = range(len(prompts)) if rows is None else rows
        return self._write(prompts, [named_seed(self.seed, "rollout", step, row) for row in rows], 1.0, ended)

    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """See `Sampler`."""
        return self._write(prompts, [0] * len(prompts), 0.0)

    def _write(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float, ended: Ended | None = None
    ) -> list[Rollout]:
        policy = self.policy
        limit = policy.settings.max_new_tokens
        prompt_ids = [policy.prompt_ids(prompt) for prompt in prompts]
        requests = [
            Request(ids, seed, limit, temperature=temperature) for ids, seed in zip(prompt_ids, seeds, strict=True)
        ]
        rollouts: dict[int, Rollout] = {}

        def over(place: int, draws: list[Draw]) -> None:
            rollouts[place] = self._rollout(prompts[place], prompt_ids[place], draws[0])
            if ended is not None:
                ended(place, rollouts[place])

        policy.model.eval()
        with policy.computing():
            sample(policy.model, requests, policy.end_ids, ended=over)
        return [rollouts[place] for place in range(len(prompts))]
