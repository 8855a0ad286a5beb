"""Rollouts by the embedded sampler: the student's own words with their log-probs and entropies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omniopd.losses import entropy, token_logp
from omniopd.sampling import Request, named_seed, sample
from omniopd.types import Prompt, Rollout
from omniopd.verification.text import char_ends
from students.policy import Policy


class Sampler:
    """Samples from the policy at temperature 1, top-p 1: anything else breaks the gradient's identity."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy, self.seed = policy, seed

    def sample(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """One rollout per prompt. Row r of step s draws from a stream named by (seed, s, r)."""
        seeds = [named_seed(self.seed, "rollout", step, row) for row in range(len(prompts))]
        return self._write(prompts, seeds, temperature=1.0)

    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The likeliest answers, for evaluation."""
        return self._write(prompts, [0] * len(prompts), temperature=0.0)

    def unwritten(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Rollouts of no tokens, for methods that learn from the teacher's answers alone."""
        return [Rollout(p, self.policy.prompt_ids(p), (), (), (), (), "", "length") for p in prompts]

    def given(self, prompt: Prompt, text: str) -> Rollout:
        """A text that somebody else wrote, as if the student had: its own log-probs and entropies at every token."""
        ids, _ = self.policy.encode(text)
        ids = [*ids, self.policy.end_id]
        prompt_ids = self.policy.prompt_ids(prompt)
        with torch.no_grad():
            whole = torch.tensor([[*prompt_ids, *ids]], device=self.policy.model.device)
            logits = self.policy.model(input_ids=whole).logits[0, len(prompt_ids) - 1 : -1]
            logp = token_logp(logits, whole[0, len(prompt_ids) :])
        return Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            ids=tuple(ids),
            logprobs=tuple(logp.tolist()),
            entropy=tuple(entropy(logits).tolist()),
            ends=tuple(char_ends(ids, self.policy.decode)),
            text=self.policy.decode(ids),
            finish="stop",
            author="mixed",
        )

    def _write(self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float) -> list[Rollout]:
        limit = self.policy.settings.max_new_tokens
        prompt_ids = [self.policy.prompt_ids(prompt) for prompt in prompts]
        requests = [
            Request(ids, seed, limit, temperature=temperature) for ids, seed in zip(prompt_ids, seeds, strict=True)
        ]
        model = self.policy.model
        model.eval()
        drawn = sample(model, requests, self.policy.end_ids)
        rollouts = []
        for prompt, ids, (draw,) in zip(prompts, prompt_ids, drawn, strict=True):
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    prompt_ids=ids,
                    ids=draw.ids,
                    logprobs=draw.logprobs,
                    entropy=draw.entropy,
                    ends=tuple(char_ends(draw.ids, self.policy.decode)),
                    text=self.policy.decode(list(draw.ids)),
                    finish=draw.finish,
                )
            )
        return rollouts
