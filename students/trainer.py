"""The update: one optimizer step on a step's rollouts and the signal on them.

    L = - a * sum_t v_t log p(y_t)  -  c * sum_b w_b sum_t log p(z_bt)  +  beta * u * sum_{t in U} KL(ref || student)_t

v: the signal's values on the student's own tokens; z_b: the teacher's branches with weights w_b; U: response tokens on
which the teacher was silent. The scales a, c, u come from `Reduction` and counts over the *whole* step, so that cutting
the step into micro-batches changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from pydantic import Field
from torch import Tensor, nn

from omniopd.errors import ConfigError, NonFiniteLoss
from omniopd.losses import chunked_logp_and_kl, reduction_scales, token_nll
from omniopd.objective import Objective
from omniopd.settings import Settings
from omniopd.types import Rollout, Signal
from students.packing import Row, build_rows, micro_batches, tensors
from students.policy import Policy, split_model


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up and a constant rate after it."""

    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Coefficients:
    """What every prediction of a step is multiplied with: own tokens' -log p [R], their KL [R], branches' -log p [Q]."""

    value_R: Tensor
    anchor_R: Tensor
    branch_Q: Tensor


def coefficients(rollouts: Sequence[Rollout], signal: Signal, objective: Objective) -> Coefficients:
    """Values, weights and anchor of a step as flat coefficients, scaled by counts over the whole step."""
    value = _flat(signal.values_BT)
    audited = _flat(signal.mask_BT).bool()
    lengths = [len(r) for r in rollouts]
    if [len(v) for v in signal.values_BT] != lengths or [len(m) for m in signal.mask_BT] != lengths:
        raise ValueError(f"signal has {len(value)} tokens, rollouts have {sum(lengths)}, or they are spread otherwise")
    held = torch.ones_like(audited) if objective.anchor.where == "all" else ~audited
    weights = [torch.full((len(b.ids) - b.context,), b.weight) for b in signal.branches]
    branch = torch.cat(weights) if weights else torch.zeros(0)
    all_tokens = len(value) + round(float(branch.sum()))  # a merged reply counts as often as it was drawn
    value_scale, anchor_scale = reduction_scales(
        objective.reduction, int(audited.sum()), int(held.sum()), len(rollouts), all_tokens
    )
    if objective.reduction == "term_mean":
        branch_scale = 1 / float(branch.sum()) if len(branch) else 0.0
    else:
        branch_scale = value_scale
    return Coefficients(
        value_R=value.where(audited, torch.zeros(())) * value_scale,
        anchor_R=held.float() * (objective.anchor.beta * anchor_scale),
        branch_Q=branch * (branch_scale * signal.branch_scale),
    )


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().float() for part in parts]) if parts else torch.zeros(0)


class Learner(nn.Module):
    """The forward pass of the update as one module, so that a distributed wrapper sees every use of the weights."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.model = policy.model  # registered: its parameters are this module's

    def forward(self, rows: list[Row], anchored: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """log p of the rows' own tokens [r], their KL(ref || student) [r] if anchored, and log p of branch tokens [q]."""
        model = self.policy.causal_lm
        inputs = tensors(rows, model.dtype, model.device)
        hidden, head = self._hidden(model, inputs)
        at = [(b, i) for b, row in enumerate(rows) for i, _, _ in row.own_sites]
        targets = torch.tensor([token for row in rows for _, token, _ in row.own_sites], dtype=torch.long)
        reference = reference_head = None
        if anchored and at:
            with torch.no_grad(), self.policy.reference() as frozen:
                reference, reference_head = self._hidden(frozen, inputs)
                reference = _gather(reference, at)
                reference_head = getattr(
                    reference_head, "base_layer", reference_head
                )  # adapters may sit on the head too
        size = self.policy.settings.slice_tokens
        logp, kl = chunked_logp_and_kl(
            _gather(hidden, at), head, targets.to(model.device), reference, reference_head, size
        )
        sites = [(b, i, token) for b, row in enumerate(rows) for i, token, _ in row.branch_sites]
        unique = {site: n for n, site in enumerate(dict.fromkeys(sites))}  # texts that agree share their predictions
        targets = torch.tensor([token for _, _, token in unique], dtype=torch.long).to(model.device)
        branch_logp, _ = chunked_logp_and_kl(
            _gather(hidden, [(b, i) for b, i, _ in unique]), head, targets, None, None, size
        )
        branch_logp = branch_logp[[unique[site] for site in sites]]
        return logp, kl, branch_logp

    def _hidden(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Last hidden states and the head; for families that rework the logits, the logits and the identity."""
        if not self.policy.splits_head:
            return model(**inputs, use_cache=False).logits, nn.Identity()
        body, head = split_model(model)
        return body(**inputs, use_cache=False).last_hidden_state, head


def _gather(hidden: Tensor, at: list[tuple[int, int]]) -> Tensor:
    rows, columns = zip(*at, strict=True) if at else ((), ())
    return hidden[list(rows), list(columns)]


def _installed(trackers: Sequence[str]) -> list[str]:
    """The trackers, all of them installed: accelerate would leave out the others without a word."""
    have = {str(tracker) for tracker in get_available_trackers()}
    if absent := [tracker for tracker in trackers if tracker not in have]:
        raise ConfigError(f"train.track: '{absent[0]}' is not installed; pip install {absent[0]}, or leave it out")
    return list(trackers)


class Trainer:
    """Optimizer and update. State that a resumed run needs is in `state_dict`."""

    def __init__(
        self,
        policy: Policy,
        settings: OptimizerSettings,
        objective: Objective,
        trackers: Sequence[str] = (),
        log_dir: Path | None = None,
    ) -> None:
        self.policy, self.settings, self.objective = policy, settings, objective
        self.accelerator = Accelerator(log_with=_installed(trackers) or None, project_dir=log_dir)
        policy.to(self.accelerator.device)
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.learner, self.optimizer = self.accelerator.prepare(Learner(policy), optimizer)
        self.trained = trained
        self.updates = 0
        self.whole = True  # False in the middle of a step, when the weights are those of no step

    def update(self, rollouts: Sequence[Rollout], signal: Signal) -> dict[str, float]:
        """One optimizer step.

        Raises:
            NonFiniteLoss: loss or gradient is NaN or infinite; weights and optimizer are as before the call.
        """
        terms = self.accumulate(rollouts, signal)
        norm = float(self.accelerator.clip_grad_norm_(self.trained, self.settings.max_grad_norm))
        loss = terms["loss"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(
                f"loss is {loss}, gradient norm {norm}: the step was not applied; lower train.learning_rate "
                f"({self.settings.learning_rate:g}) or resume from the last checkpoint with another setting"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1.0, (self.updates + 1) / (self.settings.warmup_steps + 1))
        self.whole = False
        self.optimizer.step()
        self.whole = True
        self.updates += 1
        return {**terms, "grad_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}

    def accumulate(self, rollouts: Sequence[Rollout], signal: Signal) -> dict[str, float]:
        """Gradients of the step's loss, summed over micro-batches, and the loss by term."""
        self.optimizer.zero_grad(set_to_none=True)
        scaled = coefficients(rollouts, signal, self.objective)
        rows = build_rows(rollouts, signal.branches, trees=self.policy.packs_trees)
        anchored = self.objective.anchor.beta > 0
        value = branch = anchor = kl_sum = 0.0
        for batch in micro_batches(rows, self.policy.settings.micro_batch_tokens):
            with self.policy.learning():
                logp, kl, branch_logp = self.learner(batch, anchored)
            own = [n for row in batch for _, _, n in row.own_sites]
            teachers = [n for row in batch for _, _, n in row.branch_sites]
            terms = [
                token_nll(logp, scaled.value_R[own].to(logp.device)),
                token_nll(branch_logp, scaled.branch_Q[teachers].to(logp.device)),
            ]
            if kl is not None:
                terms.append((scaled.anchor_R[own].to(kl.device) * kl).sum())
                kl_sum += float(kl.detach()[scaled.anchor_R[own].to(kl.device) > 0].sum())
                anchor += float(terms[2].detach())
            value += float(terms[0].detach())
            branch += float(terms[1].detach())
            self.accelerator.backward(torch.stack(terms).sum())
        held = int((scaled.anchor_R > 0).sum())
        return {
            "loss": value + branch + anchor,
            "value_loss": value,
            "branch_loss": branch,
            "anchor_loss": anchor,
            "kl": kl_sum / held if held else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
