"""Log-probs and entropies of given tokens under the policy's present weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omniopd.losses import entropy, token_logp
from students.policy import Policy

Scored = tuple[tuple[float, ...], tuple[float, ...]]
"""Log-probs [T] and entropies [T] in nats, over the whole vocabulary in fp32, at temperature 1."""


@torch.no_grad()
def score(policy: Policy, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
    """What the policy gives each token of each response, and how unsure it is there.

    Args:
        texts: (prompt ids, response ids [T]) each.
    """
    found = []
    for prompt_ids, ids in texts:
        whole = torch.tensor([[*prompt_ids, *ids]], device=policy.model.device)
        logits = policy.model(input_ids=whole).logits[0, len(prompt_ids) - 1 : -1]
        logp = token_logp(logits, whole[0, len(prompt_ids) :])
        found.append((tuple(logp.tolist()), tuple(entropy(logits).tolist())))
    return found
