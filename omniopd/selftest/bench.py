"""What the checks of the self-test work on: some rollouts of the run's student, what its teacher says, and trial updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omniopd.method import Method
from omniopd.prompt_check import Compared
from omniopd.run import Run
from omniopd.selftest import mirror
from omniopd.selftest.rehearsal import rehearsed
from omniopd.types import Evidence, Query, Rollout, ScoreQuery, Signal, TokenScores
from students.batches import micro_batches
from students.packing import build_rows
from students.view import StudentView

SHORT = 48  # tokens of the rollouts that trial updates are made with
ENTRIES = 512  # of each tensor's gradient that are compared


def unchanged(scores: TokenScores) -> TokenScores:
    """No change."""
    return scores


@dataclass(frozen=True)
class Push:
    """A trial update: its loss, the norm of its gradient, and a sample of the gradient's entries."""

    loss: float
    norm: float
    sample: Tensor

    @classmethod
    def of(cls, loss: float, trained: Sequence[Tensor]) -> Push:
        """From the gradients that the weights hold."""
        grads = [weight.grad.detach() for weight in trained if weight.grad is not None]
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
        sample = [grad.flatten()[:: max(1, grad.numel() // ENTRIES)].float().cpu() for grad in grads]
        return cls(loss, norm, torch.cat(sample) if sample else torch.zeros(0))

    def apart(self, other: Push) -> float:
        """How far two updates are from each other, loss and gradient, as a share of the larger one."""
        size = max(abs(self.loss), abs(other.loss), 1e-12)
        length = max(float(self.sample.norm()), float(other.sample.norm()), 1e-12)
        return max(abs(self.loss - other.loss) / size, float((self.sample - other.sample).norm()) / length)


@dataclass
class Bench:
    """Rollouts of the run's first step, what its teacher said of them when asked twice, and both sides' prompts compared.

    `short` are the same rollouts cut to `SHORT` tokens, for trial updates.
    """

    run: Run
    rollouts: Sequence[Rollout]
    first: Sequence[Evidence] = ()
    again: Sequence[Evidence] = ()
    shown: Compared | None = None

    def __post_init__(self) -> None:
        self.short = [shortened(rollout, self.run.policy.decode) for rollout in self.rollouts]

    @property
    def method(self) -> Method:
        return self.run.method

    @property
    def queries(self) -> list[Query]:
        """What the method asks about the short rollouts."""
        return self.method.audit(self.short, 1)

    @property
    def scored(self) -> bool:
        """Whether the method learns from scores of given text."""
        return any(isinstance(query, ScoreQuery) for query in self.queries)

    @property
    def tolerance(self) -> float:
        """The share of an update that rounding may change."""
        return 1e-3 if self.run.config.student.compute_dtype == "float32" else 5e-2

    @property
    def bare(self) -> Method:
        """The method without its parts."""
        return getattr(self.method, "base", self.method)

    def asked(
        self, change: Callable[[TokenScores], TokenScores] = unchanged, method: Method | None = None
    ) -> tuple[list[Rollout], list[Evidence]]:
        """The short rollouts with what is measured of them, and what the student would say of them as the teacher, or that
        teacher changed."""
        policy = self.run.policy

        def answer(queries: Sequence[Query]) -> list[Evidence]:
            return mirror.evidence(policy, self.short, queries, change)

        return rehearsed(method or self.method, self.short, answer, StudentView(policy, self.short))

    def read(self, change: Callable[[TokenScores], TokenScores] = unchanged, method: Method | None = None) -> Signal:
        """What a method, the run's own unless one is given, makes of that."""
        return (method or self.method).read(*self.asked(change, method), 1)

    def read_live(self) -> Signal:
        """What the method makes of the teacher's own evidence."""
        return self.method.read(self.rollouts, self.first, 1)

    def push(self, signal: Signal) -> Push:
        """The update that a signal would make; weights and optimizer stay as they are."""
        trainer = self.run.trainer
        terms = trainer.accumulate(self.short, signal)
        found = Push.of(terms["loss"], trainer.trained)
        trainer.optimizer.zero_grad(set_to_none=True)
        return found

    @contextmanager
    def settings(self, **changes: Any) -> Iterator[None]:
        """The student with other settings of the update."""
        policy = self.run.policy
        before = policy.settings
        policy.settings = before.model_copy(update=changes)
        try:
            yield
        finally:
            policy.settings = before

    def budget(self, signal: Signal, ways: int) -> int:
        """The `micro_batch_tokens` that cut the trial update into so many micro-batches, or as many as it has rows."""
        policy = self.run.policy
        trees = policy.packs_trees
        rows = build_rows(self.short, signal.branches, trees=trees)

        def batches(size: int) -> int:
            return len(micro_batches(rows, size, forests=trees, hidden=policy.hidden_size))

        sizes = range(max(map(len, rows)) * len(rows), 0, -1)
        return next(size for size in sizes if batches(size) >= min(ways, len(rows)))


def shortened(rollout: Rollout, decode: Callable[[list[int]], str]) -> Rollout:
    """The rollout as if a lower token limit had cut it."""
    if len(rollout) <= SHORT:
        return rollout
    return replace(
        rollout,
        ids=rollout.ids[:SHORT],
        logprobs=rollout.logprobs[:SHORT],
        entropy=rollout.entropy[:SHORT],
        ends=rollout.ends[:SHORT],
        text=decode(list(rollout.ids[:SHORT])),
        finish="length",
    )
