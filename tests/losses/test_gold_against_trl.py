"""GOLD and ULD against TRL's own functions, on random logits: values and gradients within 1e-5."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from omniopd.losses.cross_tokenizer import bayesian_merge, gold_divergence, sorted_l1

pytest.importorskip("trl")
gold_trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")


def trl_loss(
    pairs: list[tuple[int, int]], *, hybrid: bool = True, beta: float = 0.5, weight: float | None = None
) -> Any:
    """TRL's loss with the "bayesian" merge and a given map of equal tokens (teacher id, student id)."""
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=weight,
        uld_hybrid_unmatched_weight=None if weight is None else 1 - weight,
        beta=beta,
    )
    names = [SimpleNamespace(get_vocab=dict), SimpleNamespace(get_vocab=dict)]
    for number, pair in enumerate(pairs):
        for side, id in zip(names, reversed(pair), strict=True):
            side.get_vocab = (lambda known: lambda: known)({**side.get_vocab(), f"token {number}": id})
    return gold_trainer.ULDLoss(config, *names)


def cut(length: int, draw: random.Random) -> list[int]:
    """Ends of the tokens of a text that long."""
    return [*sorted(draw.sample(range(1, length), draw.randint(length // 2, length - 1))), length]


def groups_of(ours: list[int], theirs: list[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Runs of tokens on both sides between the ends that both have."""
    common = sorted(set(ours) & set(theirs))
    runs = [
        [(sum(e <= a for e in side), sum(e <= b for e in side)) for side in (ours, theirs)]
        for a, b in itertools.pairwise([0, *common])
    ]
    return [(own, other) for own, other in runs]


def case(seed: int, ours: int, theirs: int) -> tuple[Any, ...]:
    """Logits, ids drawn from them and ends of a text of 12 bytes in two cuts, after a prompt of two tokens."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ends, teacher_ends = cut(12, draw), cut(12, draw)
    logits = [3 * torch.randn(2 + len(e), v, generator=generator) for e, v in ((ends, ours), (teacher_ends, theirs))]
    ids = [rows.roll(1, 0).softmax(-1).multinomial(1, generator=generator)[:, 0] for rows in logits]
    return *logits, *ids, ends, teacher_ends


def trl_value(
    loss: Any, student: Tensor, teacher: Tensor, ids: Tensor, teacher_ids: Tensor, *ends: list[int]
) -> Tensor:
    labels = [row.clone() for row in (ids, teacher_ids)]
    offsets = []
    for label, side in zip(labels, ends, strict=True):
        label[:2] = -100
        offsets.append(torch.tensor([[[0, 0]] * 2 + [list(p) for p in itertools.pairwise([0, *side])]]))
    return loss(student[None], teacher[None], labels[0][None], labels[1][None], ids[None], teacher_ids[None], *offsets)


def our_value(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    teacher_ids: Tensor,
    ends: list[int],
    teacher_ends: list[int],
    **settings: Any,
) -> Tensor:
    """The mean over groups; rows of the answer are those that predict its tokens, one position before them."""
    groups = groups_of(ends, teacher_ends)
    own = bayesian_merge(student[1:-1].log_softmax(-1), ids[2:], [own for own, _ in groups])
    other = bayesian_merge(teacher[1:-1].log_softmax(-1), teacher_ids[2:], [other for _, other in groups])
    if not settings:
        return sorted_l1(own.exp(), other.exp()).mean()
    return gold_divergence(own, other, **settings).mean()


def agrees(ours: Any, theirs: Any, student: Tensor) -> None:
    found = []
    for function in (ours, theirs):
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        found.append((value.detach().reshape(()), *torch.autograd.grad(value.sum(), leaf)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-5)
    assert found[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("ours", "theirs"), [(20, 30), (30, 20)], ids=["teacher wider", "narrower"])
@pytest.mark.parametrize(("beta", "weight"), [(0.5, None), (0.0, None), (1.0, None), (0.3, 0.7)])
def test_gold_agrees_with_trl(seed: int, ours: int, theirs: int, beta: float, weight: float | None) -> None:
    student, teacher, *rest = case(seed, ours, theirs)
    pairs = list(zip(range(2, 20, 2), random.Random(seed).sample(range(20), 9), strict=True))
    loss = trl_loss(pairs, beta=beta, weight=weight)
    settings = {"matched": torch.tensor(pairs).T, "beta": beta, "matched_weight": weight}
    agrees(
        lambda logits: our_value(logits, teacher, *rest, **settings),
        lambda logits: trl_value(loss, logits, teacher, *rest),
        student,
    )


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_gold_agrees_with_trl_below_the_floor(scale: float) -> None:
    """Logits so far apart that most probabilities are below 1e-8, also those of the tokens that were written."""
    student, teacher, *rest = case(3, 24, 24)
    pairs = [(id, id) for id in range(16)]
    settings = {"matched": torch.tensor(pairs).T, "beta": 0.5}
    agrees(
        lambda logits: our_value(logits, scale * teacher, *rest, **settings),
        lambda logits: trl_value(trl_loss(pairs), logits, scale * teacher, *rest),
        scale * student,
    )


def test_gold_agrees_with_trl_where_all_tokens_match() -> None:
    student, teacher, *rest = case(5, 16, 16)
    pairs = [(id, id) for id in range(16)]
    settings = {"matched": torch.tensor(pairs).T, "beta": 0.5}
    agrees(
        lambda logits: our_value(logits, teacher, *rest, **settings),
        lambda logits: trl_value(trl_loss(pairs), logits, teacher, *rest),
        student,
    )


@pytest.mark.parametrize("seed", range(6))
def test_sorted_l1_agrees_with_trl(seed: int) -> None:
    """TRL's ULD over the same groups, without equal tokens."""
    student, teacher, *rest = case(seed, 20, 30)
    loss = trl_loss([(0, 0)], hybrid=False)
    agrees(
        lambda logits: our_value(logits, teacher, *rest),
        lambda logits: trl_value(loss, logits, teacher, *rest),
        student,
    )
