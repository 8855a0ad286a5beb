"""Log-probs and entropies of given tokens under the policy's present weights.

As in the update, logits exist for a slice of positions at a time; texts of similar length share a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from omniopd.losses import entropy, frozen_head, slice_bounds, slice_size, token_logp
from omniopd.model import split_model
from omniopd.types import Distributions
from students.policy import Policy

Text = tuple[Sequence[int], Sequence[int]]
"""Prompt ids, of which there is at least one, and response ids [T]."""

Scored = tuple[tuple[float, ...], tuple[float, ...]]
"""Log-probs [T] and entropies [T] in nats, over the whole vocabulary in fp32, at temperature 1."""


@torch.no_grad()
def score(policy: Policy, texts: Sequence[Text], model: PreTrainedModel | None = None) -> list[Scored]:
    """What the policy gives each token of each response, and how unsure it is there.

    Args:
        model: the policy's causal LM unless given: its reference.
    """
    found: dict[int, Scored] = {}
    for batch in by_length(texts, policy.settings.micro_batch_tokens):
        with policy.computing():
            logp, unsure = _score_batch(policy, [texts[i] for i in batch], model or policy.causal_lm)
        lengths = [len(texts[i][1]) for i in batch]
        for i, *numbers in zip(batch, logp.split(lengths), unsure.split(lengths), strict=True):
            found[i] = (tuple(numbers[0].tolist()), tuple(numbers[1].tolist()))
    return [found[i] for i in range(len(texts))]


@torch.no_grad()
def states(policy: Policy, texts: Sequence[Text]) -> list[Distributions]:
    """The policy's next-token distributions at every token of each response."""
    found: dict[int, Distributions] = {}
    for batch in by_length(texts, policy.settings.micro_batch_tokens):
        with policy.computing():
            hidden, _, head = _forward(policy, [texts[i] for i in batch], policy.causal_lm)
            fixed = frozen_head(head, hidden)
        for i, own in zip(batch, hidden.split([len(texts[i][1]) for i in batch]), strict=True):
            found[i] = Distributions(own, fixed)
    return [found[i] for i in range(len(texts))]


def by_length(texts: Sequence[Text], budget: int) -> Iterator[list[int]]:
    """Places of texts of similar length, the longest first, at most `budget` padded tokens each (one may exceed it alone)."""
    lengths = [len(prompt) + len(ids) for prompt, ids in texts]
    batch: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score_batch(policy: Policy, texts: Sequence[Text], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all response tokens of a batch, text after text: [R] each."""
    hidden, targets, head = _forward(policy, texts, model)
    size = policy.settings.slice_tokens or slice_size(split_model(policy.causal_lm)[1].weight.shape[0])
    parts = []
    for slice_ in slice_bounds(len(targets), size):
        logits = head(hidden[slice_])
        parts.append((token_logp(logits, targets[slice_]), entropy(logits)))
    logp, unsure = zip(*parts, strict=True)
    return torch.cat(logp).cpu(), torch.cat(unsure).cpu()


def _forward(policy: Policy, texts: Sequence[Text], model: PreTrainedModel) -> tuple[Tensor, Tensor, Any]:
    """Last hidden states [R, D] that predict the response tokens of a batch, text after text, their ids [R], and the head."""
    device = policy.model.device
    rows = [torch.tensor([*prompt, *ids]) for prompt, ids in texts]
    ids = pad_sequence(rows, batch_first=True).to(device)
    seen = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    hidden, head = policy.states(model, {"input_ids": ids, "attention_mask": seen})
    at = [
        (row, place)
        for row, (prompt, response) in enumerate(texts)
        for place in range(len(prompt), len(prompt) + len(response))
    ]
    row_of, place_of = torch.tensor(at, dtype=torch.long, device=device).reshape(-1, 2).T
    return hidden[row_of, place_of - 1], ids[row_of, place_of], head
