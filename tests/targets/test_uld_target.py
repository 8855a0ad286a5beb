"""ULD's target: position against position, as far as the shorter side goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniopd.targets.uld import SortedTarget
from omniopd.types import Distributions

NO_IDS = torch.zeros(0, dtype=torch.long)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target_of(logits: Tensor, size: int, weight: float = 1.0) -> SortedTarget:
    return SortedTarget(Distributions(logits, lambda rows: rows), size, weight)


def slow(p: Tensor, q: Tensor) -> float:
    """The L1 of sorted lists, zeros where one is over."""
    width = max(len(p), len(q))
    sides = [sorted(side.tolist(), reverse=True) + [0.0] * (width - len(side)) for side in (p, q)]
    return sum(abs(a - b) for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize(("ours", "theirs"), [(5, 8), (8, 5)], ids=["teacher wider", "narrower"])
@pytest.mark.parametrize("positions", [3, 6], ids=["teacher shorter", "longer"])
def test_positions_of_both_sides_against_loops(ours: int, theirs: int, positions: int) -> None:
    teacher, student = drawn(positions, theirs), drawn(4, ours, seed=1)
    found = target_of(teacher, theirs, 1.5).divergence(student, NO_IDS, 0)
    both = min(positions, 4)
    p, q = student.softmax(-1), teacher.softmax(-1)
    expected = [1.5 * slow(p[t], q[t]) for t in range(both)] + [0.0] * (4 - both)
    assert found.tolist() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_o9_slices_give_what_the_whole_gives(size: int) -> None:
    """The teacher's last position lies inside the second slice, and whole slices lie beyond it."""
    target, logits = target_of(drawn(4, 7), 7), drawn(8, 5, seed=1)
    found = torch.cat([target.divergence(logits[at : at + size], NO_IDS, at) for at in range(0, 8, size)])
    torch.testing.assert_close(found, target.divergence(logits, NO_IDS, 0), atol=1e-15, rtol=0)
    assert found[3] > 0
    assert found[4:].tolist() == [0.0] * 4


def test_gradients_by_finite_differences() -> None:
    target = target_of(drawn(3, 7), 7)
    assert torch.autograd.gradcheck(lambda x: target.divergence(x, NO_IDS, 0), drawn(4, 5, seed=1).requires_grad_())


def test_a_self_teacher_gives_zero_and_a_shifted_one_does_not() -> None:
    logits = 2 * drawn(5, 9)
    assert target_of(logits, 9).divergence(logits, NO_IDS, 0).abs().max() == 0
    assert target_of(logits.roll(1, 0), 9).divergence(logits, NO_IDS, 0).min() > 0.05


def test_r12_padding_of_the_teachers_output_layer_means_nothing() -> None:
    teacher, student = drawn(3, 6), drawn(3, 5, seed=1)
    padded = torch.cat([teacher, torch.full((3, 4), 5.0, dtype=torch.float64)], 1)
    found = target_of(padded, 6).divergence(student, NO_IDS, 0)
    assert torch.equal(found, target_of(teacher, 6).divergence(student, NO_IDS, 0))
