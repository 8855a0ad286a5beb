"""The update: one optimizer step on a step's rollouts and the signal on them.

    L = a * sum_t (D_t - v_t log p(y_t))  -  c * sum_b w_b sum_t log p(z_bt)  +  beta * u * sum_{t in U} KL(ref || student)_t

v: the signal's values on the student's own tokens; D: the divergence from the teacher's distributions, where it has any;
z_b: the teacher's branches with weights w_b; U: response tokens on which the teacher was silent. The scales a, c, u come
from `Reduction` and counts over the *whole* step, so that cutting the step into micro-batches changes nothing. Where older
weights wrote a rollout, v_t is multiplied with a truncated importance ratio (`students.stale`).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from pydantic import Field
from torch import Tensor
from torch.utils._pytree import tree_map_only

from omniopd.errors import ConfigError, NonFiniteLoss
from omniopd.objective import Objective
from omniopd.settings import Settings
from omniopd.types import Metric, Observing, Rollout, Signal, Target
from students.batches import Batch, blank_batch, micro_batches
from students.learner import Learner
from students.packing import build_rows
from students.policy import Policy
from students.ranks import Ranks
from students.sharding import shard, spread_like, unsharded, whole
from students.stale import Stale, ratio_figures
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


def observed(targets: Sequence[Target | None]) -> Counter[Any]:
    """What the targets saw, as sums over the positions; empty where none of them looks."""
    sums: Counter[Any] = Counter()  # of fractions, too
    for target in targets:
        if isinstance(target, Observing):
            sums.update(target.observed)
    return sums


def _support(seen: Sequence[Counter[Any]]) -> dict[str, float]:
    """What the targets of all processes saw, as means over the positions."""
    sums: Counter[Any] = Counter()
    for one in seen:
        sums.update(one)  # `+` would lose what is not positive
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
        ranks: Ranks | None = None,
    ) -> None:
        self.policy, self.settings, self.objective = policy, settings, objective
        self.ranks = ranks or Ranks()
        gradients_only = DistributedDataParallelKwargs(broadcast_buffers=False)  # no process waits in a forward pass
        self.accelerator = Accelerator(
            cpu=self.ranks.on_cpu,
            log_with=_installed(trackers) or None,
            project_dir=log_dir,
            kwargs_handlers=[gradients_only],
        )
        if self.accelerator.mixed_precision != "no":
            raise ConfigError(
                f"student.mixed_precision: the launcher's is {self.accelerator.mixed_precision}, of which the sampler would "
                "not know; set mixed_precision to 'no' there, and student.mixed_precision=true for bfloat16"
            )
        policy.to(self.accelerator.device)
        self.learner: Any = Learner(policy)
        if self.ranks.sharded:
            shard(self.learner)
        self.trained = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        if self.ranks.sharded:
            with torch.no_grad():  # the first forward pass tells torch which module all groups belong to
                self.learner(blank_batch(policy.end_id), coefficients((), Signal((), ()), objective), ())
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate's only name
                self.learner, self.optimizer = self.accelerator.prepare(self.learner, self.optimizer)
        self.updates = 0
        self.whole = True  # False in the middle of a step, when the weights are those of no step

    def update(self, rollouts: Sequence[Rollout], signal: Signal) -> dict[str, float]:
        """One optimizer step.

        Raises:
            NonFiniteLoss: loss or gradient is NaN or infinite; weights and optimizer are as before the call.
        """
        terms = self.accumulate(rollouts, signal)
        norm = float(whole(self.accelerator.clip_grad_norm_(self.trained, self.settings.max_grad_norm)))
        loss = terms["loss"]
        if self.ranks.most(not (math.isfinite(loss) and math.isfinite(norm))):
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
        """Gradients of the step's loss, summed over micro-batches and processes, and the loss by term.

        Each process learns from its own share of the rollouts (`Ranks.mine`), which has its targets, in as many forward
        passes as any other.
        """
        self.optimizer.zero_grad(set_to_none=True)
        stale = Stale.of(rollouts, self.updates, self.settings.max_ratio)
        scaled = coefficients(rollouts, signal, self.objective, stale)
        sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64)
        ratios = [torch.zeros(0)]
        batches = self._batches(rollouts, signal)
        for number, batch in enumerate(batches, 1):
            with self._local(number < len(batches)):
                with self.policy.learning():
                    loss, parts, found = self.learner(batch, scaled, signal.targets)
                if self.ranks.count > 1:
                    loss = self._of_all(loss)
                if loss.requires_grad:
                    self.accelerator.backward(loss)
            sums += parts.cpu()
            ratios.append(found.cpu())
        everywhere = self.ranks.all((sums, torch.cat(ratios), observed(signal.targets)))
        all_sums, all_ratios, seen = zip(*everywhere, strict=True)
        *terms, kl = torch.stack(all_sums).sum(0).tolist()
        held = int((scaled.anchor_R > 0).sum())
        return {
            "loss": sum(terms),
            **dict(zip(TERMS, terms, strict=True)),
            "kl": kl / held if held else 0.0,
            **_support(seen),
            **(ratio_figures(torch.cat(all_ratios), stale.most) if stale else {}),
        }

    def gram(
        self, rollouts: Sequence[Rollout], signals: Sequence[Signal], metric: Metric = "identity"
    ) -> list[list[float]]:
        """Inner products [K, K] of the gradients of K signals on the same rollouts, over all trained weights, in float64.

        Each signal's loss has its own scale (`coefficients`). The gradients that wait for an update are dropped.
        """
        scales: Sequence[Tensor | float] = self._whitening() if metric == "adam" else [1.0] * len(self.trained)
        gradients = []
        for signal in signals:
            self.accumulate(rollouts, signal)
            pairs = zip(self.trained, scales, strict=True)
            gradients.append([whole(w.grad).double() * scale if w.grad is not None else None for w, scale in pairs])
        self.optimizer.zero_grad(set_to_none=True)
        return [[_product(one, other) for other in gradients] for one in gradients]

    def _whitening(self) -> list[Tensor]:
        """`1 / sqrt(v + mean v)` of each trained weight, v AdamW's second moments: weights that it has hardly met count as
        those of an average one, or the rarest token would decide every inner product [ours]."""
        states = [self.optimizer.state.get(w, {}).get("exp_avg_sq") for w in self.trained]
        found = zip(self.trained, states, strict=True)
        moments = [whole(torch.zeros_like(w) if v is None else v).double() for w, v in found]
        mean = sum(float(v.sum()) for v in moments) / sum(v.numel() for v in moments)
        return [(v + mean).rsqrt() if mean else torch.ones_like(v) for v in moments]

    def _batches(self, rollouts: Sequence[Rollout], signal: Signal) -> list[Batch]:
        """This process's micro-batches, as many as any other has (trap S3)."""
        own = {row for row, _ in self.ranks.mine(rollouts)}
        trees = self.policy.packs_trees
        rows = build_rows(rollouts, signal.branches, trees=trees, only=own)
        budget = self.policy.settings.micro_batch_tokens
        batches = micro_batches(rows, budget, forests=trees, hidden=self.policy.hidden_size)
        missing = self.ranks.most(len(batches)) - len(batches)
        return batches + [blank_batch(self.policy.end_id)] * missing

    def _local(self, more: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged once, behind the last micro-batch; sharded ones each time, as until then they would have to
        be whole."""
        if not more or self.ranks.sharded:
            return nullcontext()
        return cast(AbstractContextManager[Any], self.accelerator.no_sync(self.learner))

    def _of_all(self, loss: Tensor) -> Tensor:
        """The loss whose gradient, averaged over processes, is the step's.

        The exchange waits for the gradient of every weight, whatever this process has to learn.
        """
        if not self.ranks.sharded:
            loss = loss + 0 * torch.stack([weight.sum() for weight in self.trained]).sum()
        return loss * self.ranks.count

    def end(self) -> None:
        """The trackers have heard all."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """The student's weights are whole in this block, for whatever reads them outside the update (see `unsharded`)."""
        with unsharded(self.learner):
            yield

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, the same for any number of processes. Where they are sharded, all must ask."""
        return {"optimizer": tree_map_only(Tensor, whole, self.optimizer.state_dict()), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        for weight in self.trained:
            for name, value in self.optimizer.state[weight].items():
                if value.shape == weight.shape:  # not so the count of steps
                    self.optimizer.state[weight][name] = spread_like(value, weight)
        self.updates = state["updates"]


def _product(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """The inner product of two gradients, weight by weight; None is a gradient of 0."""
    pairs = zip(one, other, strict=True)
    return math.fsum(float((a * b).sum()) for a, b in pairs if a is not None and b is not None)
