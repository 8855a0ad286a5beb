"""What `test_ranks.py` lets one process do, and two: `python ranked.py STUDENT RESULTS NAME...`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from test_trainer import moved, objective, retuned, rollouts_of, signal_of

from omniopd.targets.full import FullTarget
from omniopd.targets.subset import SubsetTarget
from omniopd.types import Distributions, Rollout, Signal
from students.policy import Policy
from students.ranks import Ranks
from students.sharding import whole
from students.trainer import OptimizerSettings, Trainer

FAST = OptimizerSettings(learning_rate=1e-2)


def updated(student: Policy, rollouts: Sequence[Rollout], signal: Signal, ranks: Ranks, **how: Any) -> dict[str, Any]:
    """Loss and gradient of a step, the weights after two updates, and what the updates report."""
    trainer = Trainer(student, FAST, objective(**how), ranks=ranks)
    retuned(student, micro_batch_tokens=80)
    trainer.accumulate(rollouts, signal)
    grads = [whole(p.grad) if p.grad is not None else torch.zeros(p.shape) for p in trainer.trained]
    metrics = [trainer.update(rollouts, signal) for _ in range(2)]
    return {
        "metrics": metrics,
        "gradient": torch.cat([grad.flatten() for grad in grads]),
        "weights": torch.cat([whole(p.detach()).flatten() for p in trainer.trained]),
    }


def branches(folder: Path, ranks: Ranks) -> dict[str, Any]:
    student = moved(tiny.policy(folder))
    rollouts = rollouts_of(student)
    return updated(student, rollouts, signal_of(rollouts), ranks)


def branches_in_rows(folder: Path, ranks: Ranks) -> dict[str, Any]:
    student = moved(tiny.policy(folder))
    student.packs_trees = False
    rollouts = rollouts_of(student)
    return updated(student, rollouts, signal_of(rollouts), ranks, reduction="token_mean")


def nothing_to_learn(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The second process's rollouts, every other one, have no tokens."""
    student = moved(tiny.policy(folder))
    some = rollouts_of(student)
    rollouts = [some[0], some[2], some[4], some[2]]
    return updated(student, rollouts, signal_of(rollouts, branches=False), ranks)


def nothing_to_say(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A step in which no process has anything to learn: all of them still come to every exchange."""
    student = moved(tiny.policy(folder))
    rollouts = rollouts_of(student)
    silent = Signal(tuple(torch.zeros(len(r)) for r in rollouts), tuple(torch.zeros(len(r)).bool() for r in rollouts))
    return updated(student, rollouts, silent, ranks, beta=0.0)


def inner_products(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Gradients of several signals against one another, as a schedule reads them."""
    student = moved(tiny.policy(folder))
    rollouts = rollouts_of(student)
    some, other = signal_of(rollouts), signal_of(rollouts, branches=False)
    trainer = Trainer(student, FAST, objective(), ranks=ranks)
    gram = trainer.gram(rollouts, [some, other])
    named = {f"{i}, {j}": number for i, row in enumerate(gram) for j, number in enumerate(row)}
    return {"metrics": [named], "weights": torch.cat([whole(p.detach()).flatten() for p in trainer.trained])}


def reworked_logits(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A model whose head can't be read in slices, and a process without tokens."""
    student = moved(tiny.policy(folder))
    student.splits_head = False
    some = rollouts_of(student)
    rollouts = [some[0], some[2], some[4], some[2]]
    return updated(student, rollouts, signal_of(rollouts, branches=False), ranks, beta=0.0)


def dense(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Targets of both kinds; the distributions of the other process's rollouts have come in a parcel."""
    student = moved(tiny.policy(folder))
    rollouts = rollouts_of(student)
    torch.manual_seed(5)
    head = torch.nn.Linear(8, len(student.tokenizer), bias=False)
    given = [Distributions(torch.randn(len(rollout), 8), head) for rollout in rollouts]
    parts = ranks.all(dict(ranks.mine(given)))
    theirs = {row: distributions for part in parts for row, distributions in part.items()}
    targets = tuple(
        SubsetTarget(theirs[row], 4) if row % 2 else FullTarget(theirs[row], "jsd") for row in range(len(rollouts))
    )
    signal = signal_of(rollouts, branches=False)
    weights = tuple(torch.rand(len(rollout)) for rollout in rollouts)
    return updated(student, rollouts, Signal(signal.values_BT, signal.mask_BT, targets, weights_BT=weights), ranks)


def lora(folder: Path, ranks: Ranks) -> dict[str, Any]:
    student = moved(tiny.policy(folder, lora={"rank": 4}))
    rollouts = rollouts_of(student)
    return updated(student, rollouts, signal_of(rollouts), ranks)


def sampled(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Rollouts of unequal lengths, by weights that are whole for as long as each process writes."""
    student = moved(tiny.policy(folder))
    trainer = Trainer(student, FAST, objective(), ranks=ranks)
    prompts = [tiny.prompt("Hi" * n, f"p{n}") for n in (1, 5, 2)]
    texts = []
    for step in (1, 2):
        rows, mine = zip(*ranks.mine(prompts), strict=True)
        with trainer.unsharded():
            written = tiny.sampler(student).sample(mine, step, rows)
        parts = ranks.all(list(zip(rows, written, strict=True)))
        rollouts = [rollout for _, rollout in sorted((pair for part in parts for pair in part), key=lambda p: p[0])]
        trainer.update(rollouts, signal_of(rollouts, branches=False))
        texts += [list(rollout.ids) for rollout in rollouts]
    return {"texts": texts, "weights": torch.cat([whole(p.detach()).flatten() for p in trainer.trained])}


def cosine(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Of two signals' gradients, in the metric of the optimizer's second moments after an update."""
    student = moved(tiny.policy(folder))
    rollouts = rollouts_of(student)
    signal = signal_of(rollouts, branches=False)
    other = replace(signal, values_BT=tuple(value * (torch.arange(len(value)) < 3) for value in signal.values_BT))
    trainer = Trainer(student, FAST, objective(beta=0.0), ranks=ranks)
    trainer.update(rollouts, signal)
    gram = torch.tensor(trainer.gram(rollouts, [signal, other], "adam"))
    return {"weights": gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()}


SCENARIOS: dict[str, Callable[[Path, Ranks], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        branches,
        branches_in_rows,
        nothing_to_learn,
        nothing_to_say,
        inner_products,
        cosine,
        reworked_logits,
        dense,
        lora,
        sampled,
    )
}

if __name__ == "__main__":
    folder, results, *names = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = Ranks(60)
    with ranks.alike():
        for name in names:
            torch.save(SCENARIOS[name](Path(folder), ranks), Path(results) / f"{name}-{ranks.index}.pt")
