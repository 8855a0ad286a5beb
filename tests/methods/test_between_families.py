"""What holds for every method that reads scores between two tokenizers: cuts, order and processes change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from apart import apart
from between_families import built, evidence_of, rows_of, taught
from scored_by import scored

from omniopd.registry import METHODS
from omniopd.types import Evidence, Query, Rollout
from students.policy import Policy

SCORED = frozenset({"score", "topk", "logits"})
NAMES = [
    name for name in METHODS.names() if (needs := METHODS.get(name).needs) & SCORED and "same tokenizer" not in needs
]


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


@pytest.fixture(scope="module")
def teacher(tiny_folder: Callable[..., Path]) -> Policy:
    """SentencePiece, where the student is byte-level."""
    return tiny.policy(tiny_folder("pieces", "llama", seed=3))


def rows(student: Policy) -> list[Rollout]:
    """One prompt each."""
    return [replace(row, prompt=tiny.prompt(f"What is {i} + 7?", f"p{i}")) for i, row in enumerate(rows_of(student))]


def test_these_are_the_methods_between_families() -> None:
    assert {"alm", "bpm", "dpca", "gold", "uld"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_slices_and_padding_change_nothing(name: str, llama_folder: Path, teacher: Policy) -> None:
    losses, gradients = [], []
    for settings in ({}, {"slice_tokens": 2}, {"slice_tokens": 7, "micro_batch_tokens": 1}):
        student = tiny.policy(llama_folder, **settings)
        loss, gradient = taught(student, teacher, rows_of(student), name=name)
        losses.append(loss)
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    assert float(gradients[0].abs().max()) > 1e-3
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_rows_changes_nothing(name: str, student: Policy, teacher: Policy) -> None:
    given, order = rows(student), [2, 0, 1]
    method = built(student, name=name)
    one, other = (
        method.read(some, evidence_of(method, teacher, some), 1) for some in (given, [given[i] for i in order])
    )
    for place, row in enumerate(order):
        assert torch.equal(other.values_BT[place], one.values_BT[row])
        assert torch.equal(other.mask_BT[place], one.mask_BT[row])
    assert (other.drops, other.rejects) == (one.drops, one.rejects)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_read_what_one_reads(name: str, student: Policy, teacher: Policy) -> None:
    """The other's distributions come as their shape, its vocabulary whole."""

    def answer(queries: Sequence[Query]) -> list[Evidence]:
        return [scored(teacher, query) for query in queries]

    given = rows(student)
    alone, *two = (built(student, name=name) for _ in range(3))
    (expected,) = apart([alone], student, given, answer)
    for found in apart(two, student, given, answer):
        signal, whole = found.signal, expected.signal
        assert all(map(torch.equal, signal.values_BT, whole.values_BT))
        assert all(map(torch.equal, signal.mask_BT, whole.mask_BT)) and whole.coverage > 0
        assert (signal.drops, signal.rejects, dict(signal.stats)) == (whole.drops, whole.rejects, dict(whole.stats))
