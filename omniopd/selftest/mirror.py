"""Made-up teachers for the self-test: the student itself, one that disagrees, and one that says where it stands.

They answer the method's own queries about given rollouts, so that everything behind the teacher is the run's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omniopd.losses import frozen_head
from omniopd.types import (
    AnswerQuery,
    Answers,
    Continuations,
    ContinueQuery,
    Distributions,
    Evidence,
    Query,
    Reply,
    Rollout,
    ScoreQuery,
    TokenScores,
)
from students.policy import Policy

STEP = 1 / 64  # nats between two places of the canary: exact in binary, and small beside any clamp


def itself(policy: Policy, rollout: Rollout, query: ScoreQuery) -> TokenScores:
    """What the student gives its own tokens: the log-probs that the sampler recorded, distributions of a pass of its own."""
    hidden, head = last_hidden(policy, rollout)
    tokens, vocabulary = len(rollout), policy.vocabulary
    ends = (None,) * tokens if vocabulary.lossy else vocabulary.spell(rollout.ids).ends
    return TokenScores(
        query=query,
        ids=rollout.ids,
        ends=ends,
        logprobs=rollout.logprobs,
        top=likeliest(head(hidden), query.top) if query.top else (),
        distributions=Distributions(hidden, head) if query.whole else None,
        vocabulary=vocabulary,
    )


def asked_about(policy: Policy, rollout: Rollout, query: ScoreQuery) -> Rollout:
    """The rollout that a query has scored: the student's, or one with the ids that a part of the method made of it."""
    if query.ids == rollout.ids and not query.after:
        return rollout
    other = replace(rollout, prompt_ids=(*rollout.prompt_ids, *query.after), ids=query.ids)
    hidden, head = last_hidden(policy, other)
    logp = head(hidden).float().log_softmax(-1).gather(1, torch.tensor(query.ids, device=hidden.device)[:, None])
    return replace(other, logprobs=tuple(logp[:, 0].tolist()))


def disagreeing(scores: TokenScores) -> TokenScores:
    """The same, a nat or two lower, and with every distribution one place too late."""
    found = scores.distributions
    return replace(
        scores,
        logprobs=tuple(value - 1 - place % 2 for place, value in enumerate(scores.logprobs)),
        top=scores.top[-1:] + scores.top[:-1],
        distributions=None if found is None else Distributions(found.hidden.roll(1, 0), found.head),
    )


def canary(scores: TokenScores, weights: Tensor) -> TokenScores:
    """Scores that name their place: the log-prob of token i is minus i (in steps of `STEP`), and no two places share a
    distribution (trap R1). `weights` [V, D] are those of the student's output layer, for its size and its device."""
    places = torch.arange(len(scores.ids), dtype=torch.float32, device=weights.device)[:, None]

    def head(hidden: Tensor) -> Tensor:
        return 3 * torch.sin(hidden.float() * 0.7 + torch.arange(len(weights), device=hidden.device))

    return replace(
        scores,
        logprobs=tuple(-place * STEP for place in range(len(scores.ids))),
        top=likeliest(head(places), scores.query.top) if scores.query.top else (),
        distributions=Distributions(places, head) if scores.query.whole else None,
    )


def evidence(
    policy: Policy,
    rollouts: Sequence[Rollout],
    queries: Sequence[Query],
    change: Callable[[TokenScores], TokenScores],
) -> list[Evidence]:
    """An answer to every query. Of given text the student scores its own, changed where the method itself asks; of text to
    write, every other reply is the student's own, and the others are something else."""
    found: list[Evidence] = []
    for query in queries:
        if isinstance(query, ScoreQuery):
            scores = itself(policy, asked_about(policy, rollouts[query.row], query), query)
            found.append(scores if query.by else change(scores))
        elif isinstance(query, ContinueQuery):
            text = query.chunk.text
            found.append(
                Continuations(query, tuple(Reply([text, text[::-1]][i % 2], "length") for i in range(query.n)))
            )
        elif isinstance(query, AnswerQuery):
            found.append(Answers(query, (Reply(query.prompt.messages[-1].content, "stop"),) * query.n))
    return found


@torch.no_grad()
def last_hidden(policy: Policy, rollout: Rollout) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The student's last hidden states at the places that predict a response [T, D], and what makes logits of them.

    One row by itself, without padding. For families that rework the logits: the logits, and nothing to make of them.
    """
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]], device=policy.causal_lm.device)
    with policy.computing():
        hidden, head = policy.states(policy.causal_lm, {"input_ids": ids})
        head = frozen_head(head, hidden)
    return hidden[0, len(rollout.prompt_ids) - 1 : -1], torch.no_grad()(lambda states: head(states))


@torch.no_grad()
def likeliest(logits: Tensor, count: int) -> tuple[dict[int, float], ...]:
    """The `count` likeliest ids of each place [T, V] with their log-probs."""
    top = logits.float().log_softmax(-1).topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(dict(zip(ids, values, strict=True)) for ids, values in pairs)
