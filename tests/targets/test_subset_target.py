"""Targets on a few ids: whose ids, ragged lists of a server, and what is observed."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from toy import STUDENT, TEACHER, P, Q, value_and_gradient

from omniopd.losses.subset import Mode, full_divergence, subset_divergence
from omniopd.targets.subset import SubsetTarget, Support, TopKTarget
from omniopd.types import Distributions

LOGITS = torch.stack([STUDENT, TEACHER, STUDENT.flip(0)])
IDS = torch.tensor([0, 1, 2])
KNOWN = Distributions(torch.stack([TEACHER, STUDENT, TEACHER]), lambda hidden: hidden)
LOGQ = KNOWN.hidden.log_softmax(-1)


def likeliest(logits: Tensor, k: int) -> Tensor:
    return logits.topk(k).indices


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("support", ["student", "teacher"])
def test_the_ids_are_those_of_the_side_that_is_named(support: Support, mode: Mode) -> None:
    chosen = likeliest(LOGITS if support == "student" else KNOWN.hidden, 2)
    truth = value_and_gradient(
        lambda at: subset_divergence(at, chosen, LOGQ.gather(1, chosen), mode, "reverse")[0], LOGITS
    )
    target = SubsetTarget(KNOWN, 2, support, mode)
    ours = value_and_gradient(
        lambda at: torch.cat([target.divergence(at[:1], IDS[:1], 0), target.divergence(at[1:], IDS[1:], 1)]), LOGITS
    )
    for found, expected in zip(ours, truth, strict=True):
        assert torch.allclose(found, expected, atol=1e-14)
    assert target.blocks == ()


def test_common_ids_are_those_that_both_sides_name() -> None:
    """Many Faces 6: k = 3 leaves {0, 1} at the toy's position, k = 2 a single id, which is dead."""
    wide = SubsetTarget(KNOWN, 3, "common", "renorm")
    value, gradient = value_and_gradient(lambda at: wide.divergence(at, IDS[:1], 0), LOGITS[:1])
    assert value.item() == pytest.approx(0.7157980370, abs=5e-11)
    assert gradient[0].tolist() == pytest.approx([0.49153, -0.49153, 0, 0, 0], abs=6e-6)
    narrow = SubsetTarget(KNOWN, 2, "common", "renorm")
    value, gradient = value_and_gradient(lambda at: narrow.divergence(at, IDS[:1], 0), LOGITS[:1])
    assert (value.item(), gradient.any().item()) == (0, False)
    assert (narrow.observed["dead"], narrow.observed["positions"]) == (1, 1)


@pytest.mark.parametrize("support", get_args(Support))
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_k_of_the_whole_vocabulary_or_more_is_the_full_divergence(support: Support, kind: str) -> None:
    for k in (5, 64):
        value = SubsetTarget(KNOWN, k, support, "tail_bucket", kind, 0.3).divergence(LOGITS, IDS, 0)  # type: ignore[arg-type]
        assert torch.allclose(value, full_divergence(KNOWN.hidden, LOGITS, kind, 0.3), atol=1e-13)  # type: ignore[arg-type]


def test_r12_padding_of_either_side_is_no_candidate() -> None:
    """The wider side's extra ids are the likeliest of all, and take no part."""
    padding = torch.full((3, 2), 9.0, dtype=torch.float64)
    for support in get_args(Support):
        truth = SubsetTarget(KNOWN, 2, support).divergence(LOGITS, IDS, 0)
        padded = Distributions(torch.cat([KNOWN.hidden, padding], 1), lambda hidden: hidden)
        assert torch.equal(SubsetTarget(padded, 2, support).divergence(LOGITS, IDS, 0), truth)
        assert torch.equal(SubsetTarget(KNOWN, 2, support).divergence(torch.cat([LOGITS, padding], 1), IDS, 0), truth)


def test_what_is_observed_adds_up_over_slices() -> None:
    target = SubsetTarget(KNOWN, 2, "student")
    target.divergence(LOGITS[:1], IDS[:1], 0)
    assert target.observed["student_mass"] == pytest.approx(0.7701451679, abs=5e-11)
    assert target.observed["teacher_mass"] == pytest.approx(Q[:2].sum().item())
    target.divergence(LOGITS[1:], IDS[1:], 1)
    assert (target.observed["positions"], target.observed["dead"]) == (3, 0)
    masses = [P[:2].sum(), Q[[1, 3]].sum(), P[:2].sum()]
    assert target.observed["student_mass"] == pytest.approx(sum(mass.item() for mass in masses))


TOP = [{1: LOGQ[0, 1].item(), 3: LOGQ[0, 3].item()}, {}, {4: LOGQ[2, 4].item(), 0: math.nan, 2: LOGQ[2, 2].item()}]


@pytest.mark.parametrize("mode", get_args(Mode))
def test_r10_r13_a_servers_ragged_list_is_read_by_id(mode: Mode) -> None:
    """Two ids, none, and three of which one is a hole: each position is the subset divergence on what there is."""
    target = TopKTarget(TOP, mode)
    value, gradient = value_and_gradient(
        lambda at: torch.cat([target.divergence(at[:2], IDS[:2], 0), target.divergence(at[2:], IDS[2:], 2)]), LOGITS
    )
    for row, kept in ((0, [3, 1]), (2, [2, 4])):
        ids = torch.tensor(kept)
        truth = value_and_gradient(
            lambda at, ids=ids, row=row: subset_divergence(at, ids, LOGQ[row, ids], mode)[0],
            LOGITS[row],
        )
        assert value[row].item() == pytest.approx(truth[0].item(), abs=1e-14)
        assert torch.allclose(gradient[row], truth[1], atol=1e-14)
    assert (value[1].item(), gradient[1].any().item()) == (0, False)
    assert (target.observed["positions"], target.observed["dead"]) == (3, 1)


def test_r12_an_id_past_the_students_output_layer_raises() -> None:
    with pytest.raises(ValueError, match="named id 7, the student has 5"):
        TopKTarget([{7: -1.0}]).divergence(LOGITS[:1], IDS[:1], 0)


def test_a_server_that_named_nothing_at_all() -> None:
    value, gradient = value_and_gradient(lambda at: TopKTarget([{}, {}, {}]).divergence(at, IDS, 0), LOGITS)
    assert value.tolist() == [0, 0, 0]
    assert not gradient.any()
