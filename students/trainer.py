"""The update: one optimizer step on a step's rollouts and the signal on them.

    L = a * sum_t (D_t - v_t log p(y_t))  -  c * sum_b w_b sum_t log p(z_bt)  +  beta * u * sum_{t in U} KL(ref || student)_t

v: the signal's values on the student's own tokens; D: the divergence from the teacher's distributions, where it has any;
z_b: the teacher's branches with weights w_b; U: response tokens on which the teacher was silent. The scales a, c, u come
from `Reduction` and counts over the *whole* step, so that cutting the step into micro-batches changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from pydantic import Field

from omniopd.errors import ConfigError, NonFiniteLoss
from omniopd.objective import Objective
from omniopd.settings import Settings
from omniopd.types import Observing, Rollout, Signal, Target
from students.learner import Learner
from students.packing import build_rows, micro_batches
from students.policy import Policy
from students.ranks import Ranks
from students.terms import TERMS, coefficients


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up and a constant rate after it."""

    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_ratio: float = Field(
        default=2.0, ge=1, description="own tokens of older weights count by p_now / p_then, at most this"
    )


def observed(targets: Sequence[Target | None]) -> dict[str, float]:
    """What the targets saw, as means over the positions; empty where none of them looks."""
    sums: Counter[Any] = Counter()  # of fractions, too
    for target in targets:
        if isinstance(target, Observing):
            sums.update(target.observed)
    positions = sums.pop("positions", 0)
    return {f"support_{name}": amount / positions for name, amount in sums.items()} if positions else {}


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
        self.ranks = Ranks()
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
        sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64)
        for batch in micro_batches(rows, self.policy.settings.micro_batch_tokens):
            with self.policy.learning():
                loss, parts = self.learner(batch, scaled, signal.targets)
            sums += parts.cpu()
            if loss.requires_grad:
                self.accelerator.backward(loss)
        *terms, kl = sums.tolist()
        held = int((scaled.anchor_R > 0).sum())
        return {
            "loss": sum(terms),
            **dict(zip(TERMS, terms, strict=True)),
            "kl": kl / held if held else 0.0,
            **observed(signal.targets),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
