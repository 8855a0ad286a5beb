"""A step of several processes without any: each with a method, rows and evidence of its own, and what they exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from omniopd.method import Method
from omniopd.selftest.rehearsal import Answer, share
from omniopd.types import Rollout, Signal, Writing
from students.parcels import Parcels
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView


class Process(NamedTuple):
    """A process's step: what it wishes for its own rows, what it reads of all, and what it tells the log afterwards."""

    wishes: Mapping[int, Writing]
    signal: Signal
    figures: Mapping[str, float]


def apart(
    methods: Sequence[Method], student: Policy, rows: Sequence[Rollout], answer: Answer, step: int = 1
) -> list[Process]:
    """What each of as many processes as there are methods makes of a step.

    As in a run, rows go round, a process asks about and measures its own, and what the others found comes in parcels, which
    hold no distributions.
    """
    count = len(methods)
    own = [{row: rows[row] for row in range(rank, len(rows), count)} for rank in range(count)]
    shares = [
        share(method, mine, answer, StudentView(student, mine.values()), step)
        for method, mine in zip(methods, own, strict=True)
    ]
    packers = [Parcels() for _ in methods]
    parcels = [packer.pack(part) for packer, part in zip(packers, shares, strict=True)]
    processes = []
    for rank, method in enumerate(methods):
        parts = [shares[other] if other == rank else packers[rank].open(parcels[other]) for other in range(count)]
        together = {row: rollout for measured, _ in parts for row, rollout in measured.items()}
        measured = [together[row] for row in range(len(rows))]
        evidence = sorted((one for _, found in parts for one in found), key=lambda one: one.query.row)
        wishes = method.writings({row: one.prompt for row, one in own[rank].items()}, shares[rank][1], step)
        signal = method.read(measured, evidence, step)
        figures = method.after(measured, signal, step, Trainer(student, OptimizerSettings(), method.objective))
        processes.append(Process(wishes, signal, figures))
    return processes
