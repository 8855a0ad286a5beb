"""GOLD's target: groups laid on positions, against loops; slices; a shifted teacher."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from toy_vocabulary import toy

from omniopd.alignment import AlignedChunk
from omniopd.losses.cross_tokenizer import gold_divergence
from omniopd.losses.divergence import generalised_jsd
from omniopd.targets.gold import GroupTarget
from omniopd.types import Distributions
from omniopd.vocabulary_map import VocabularyMap

TEACHER, STUDENT = toy("ab", "c", "ca", "b", "x"), toy("a", "b", "c", "ca")
WORDS = VocabularyMap(TEACHER, STUDENT, STUDENT.size - 1)
V, W = STUDENT.size, TEACHER.size
# the text "abcabca": student a b | ca | b (unaligned) | ca, teacher ab | c a.. ; ids below only weigh the groups
GROUPS = (AlignedChunk(0, 2, 0, 1), AlignedChunk(2, 3, 1, 3), AlignedChunk(4, 7, 3, 4))
IDS = torch.tensor([0, 1, 3, 1, 2, 0, 1])
TEACHER_IDS = (0, 1, 4, 2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target_of(logits: Tensor, words: VocabularyMap = WORDS, beta: float = 0.5) -> GroupTarget:
    return GroupTarget(GROUPS, TEACHER_IDS, Distributions(logits, lambda rows: rows), words, beta)


def slow(p: Tensor, ids: list[int], start: int, end: int) -> Tensor:
    """The joint probability of a group's earlier tokens times the last row."""
    return math.prod(float(p[t, ids[t]]) for t in range(start, end - 1)) * p[end - 1]


def test_each_group_stands_at_its_last_position() -> None:
    teacher, student = drawn(4, W), drawn(7, V, seed=1)
    found = target_of(teacher).divergence(student, IDS, 0)
    expected = torch.zeros(7, dtype=torch.float64)
    p, q = student.softmax(-1), teacher.softmax(-1)
    for group in GROUPS:
        own = slow(p, IDS.tolist(), group.start, group.end)
        other = slow(q, list(TEACHER_IDS), group.teacher_start, group.teacher_end)
        expected[group.end - 1] = gold_divergence(own.log()[None], other.log()[None], WORDS.matched)[0]
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-10)
    assert [t for t in range(7) if found[t] != 0] == [1, 2, 6]


def test_blocks_are_the_groups_runs() -> None:
    assert list(target_of(drawn(4, W)).blocks) == [(0, 2), (2, 3), (4, 7)]


@pytest.mark.parametrize("cuts", [(0, 7), (0, 2, 7), (0, 2, 3, 4, 7), (0, 3, 4, 7)])
def test_o9_slices_that_keep_blocks_whole_give_what_the_whole_gives(cuts: tuple[int, ...]) -> None:
    target = target_of(drawn(4, W))
    whole = drawn(7, V, seed=1).requires_grad_()
    parts = whole.detach().clone().requires_grad_()
    expected = target.divergence(whole, IDS, 0)
    found = torch.cat([target.divergence(parts[a:b], IDS[a:b], a) for a, b in itertools.pairwise(cuts)])
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients_by_finite_differences(beta: float) -> None:
    target = target_of(drawn(4, W), beta=beta)
    logits = drawn(7, V, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: target.divergence(x, IDS, 0), logits)
    (found,) = torch.autograd.grad(target.divergence(logits, IDS, 0).sum(), logits)
    assert all(found[t].abs().max() > 1e-4 for t in (0, 1, 2, 4, 5, 6))  # earlier tokens of a group, too
    assert found[3].abs().max() == 0


def test_a_self_teacher_gives_zero_and_a_shifted_one_does_not() -> None:
    one = VocabularyMap(STUDENT, STUDENT, STUDENT.size - 1)
    logits = 2 * drawn(5, V)
    groups = [AlignedChunk(t, t + 1, t, t + 1) for t in range(5)]
    ids = [0, 1, 2, 3, 4]
    for roll, least, most in ((0, -1e-15, 1e-14), (1, 0.05, 10.0)):
        given = Distributions(logits.roll(roll, 0), lambda rows: rows)
        found = GroupTarget(groups, ids, given, one).divergence(logits, torch.tensor(ids), 0)
        assert least <= found.min() <= found.max() <= most


def test_groups_of_one_and_all_tokens_matched_are_the_jsd_bit_for_bit() -> None:
    one = VocabularyMap(STUDENT, STUDENT, STUDENT.size - 1)
    teacher, student = drawn(5, V).float(), drawn(5, V, seed=1).float()
    groups = [AlignedChunk(t, t + 1, t, t + 1) for t in range(5)]
    target = GroupTarget(groups, [0] * 5, Distributions(teacher, lambda rows: rows), one, 0.3)
    found = target.divergence(student, torch.zeros(5, dtype=torch.long), 0)
    assert torch.equal(found, generalised_jsd(teacher, student, 0.3))


@pytest.mark.parametrize("wider", [3, 8])
def test_r12_padding_of_the_teachers_output_layer_means_nothing(wider: int) -> None:
    """It has no part in the softmax, in the sorted rest, or in the weight."""
    teacher, student = drawn(4, W), drawn(7, V, seed=1)
    padded = torch.cat([teacher, torch.full((4, wider), 5.0, dtype=torch.float64)], 1)
    found = target_of(padded).divergence(student, IDS, 0)
    assert torch.equal(found, target_of(teacher).divergence(student, IDS, 0))


def test_o11_certain_and_impossible_tokens_stay_finite() -> None:
    teacher = torch.full((4, W), -math.inf)
    teacher[:, 1] = 0.0
    student = drawn(7, V, seed=1).float()
    student[:, 3] = -math.inf  # and the student wrote it at position 2
    logits = student.requires_grad_()
    found = target_of(teacher).divergence(logits, IDS, 0)
    found.sum().backward()
    assert found.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_no_group_in_a_slice_is_zeros() -> None:
    assert target_of(drawn(4, W)).divergence(drawn(1, V), IDS[3:4], 3).tolist() == [0]
