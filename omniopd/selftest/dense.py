"""The update the slow way: a row per text, all of its logits at once, every term as its formula says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omniopd.losses import forward_kl, token_logp
from omniopd.selftest.bench import Bench, Push
from omniopd.types import Signal
from students.policy import Policy
from students.terms import coefficients


def dense_update(bench: Bench, signal: Signal) -> Push:
    """The loss of `students.trainer` and its gradient; weights and optimizer stay as they are."""
    policy, trainer = bench.run.policy, bench.run.trainer
    scaled = coefficients(bench.short, signal, trainer.objective)
    trainer.optimizer.zero_grad(set_to_none=True)
    total, done = 0.0, 0
    for row, rollout in enumerate(bench.short):
        if not len(rollout):
            continue
        span = slice(done, done + len(rollout))
        done = span.stop
        logits, ids = _logits(policy, policy.causal_lm, rollout.prompt_ids, rollout.ids)
        loss = -(scaled.value_R[span].to(logits.device) * token_logp(logits, ids)).sum()
        if signal.targets and (target := signal.targets[row]) is not None:
            loss = loss + (scaled.divergence_R[span].to(logits.device) * target.divergence(logits, ids, 0)).sum()
        if trainer.objective.anchor.beta > 0:
            with torch.no_grad(), policy.reference() as frozen:
                reference, _ = _logits(policy, frozen, rollout.prompt_ids, rollout.ids)
            loss = loss + (scaled.anchor_R[span].to(logits.device) * forward_kl(reference, logits)).sum()
        loss.backward()
        total += float(loss.detach())
    done = 0
    for branch in signal.branches:
        rollout = bench.short[branch.row]
        span = slice(done, done + len(branch.ids) - branch.context)
        done = span.stop
        logits, ids = _logits(policy, policy.causal_lm, (*rollout.prompt_ids, *rollout.ids[: branch.at]), branch.ids)
        logp = token_logp(logits[branch.context :], ids[branch.context :])
        loss = -(scaled.branch_Q[span].to(logits.device) * logp).sum()
        loss.backward()
        total += float(loss.detach())
    found = Push.of(total, trainer.trained)
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def _logits(policy: Policy, model: Any, before: Sequence[int], ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [n, V] that predict `ids` [n] after what stands before them."""
    whole = torch.tensor([[*before, *ids]], device=model.device)
    with policy.computing():
        logits = model(input_ids=whole, use_cache=False).logits
    return logits[0, len(before) - 1 : -1], whole[0, len(before) :]
