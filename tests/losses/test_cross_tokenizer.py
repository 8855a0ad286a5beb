"""Divergences between two vocabularies: golden numbers, slow references, gradients by finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omniopd.losses.cross_tokenizer import (
    FLOOR,
    bayesian_merge,
    gold_divergence,
    mapped_divergence,
    mapped_mass,
    sorted_l1,
)
from omniopd.losses.divergence import forward_kl, generalised_jsd, reverse_kl

NONE = -1


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Gradient of a scalar function by central differences."""
    flat, found = at.flatten(), torch.zeros(at.numel(), dtype=at.dtype)
    for i in range(at.numel()):
        ahead, back = flat.clone(), flat.clone()
        ahead[i] += step
        back[i] -= step
        found[i] = (function(ahead.view_as(at)) - function(back.view_as(at))) / (2 * step)
    return found.view_as(at)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found


def test_bpm_golden_mass() -> None:
    """Teacher {ab .4, abc .2, b .1, c .25, \\xff .05}, student {a, ab, b, bc, c} (the sheet's test 8)."""
    teacher = torch.tensor([[0.4, 0.2, 0.1, 0.25, 0.05]], dtype=torch.float64)
    mass, residual = mapped_mass(teacher.log(), torch.tensor([1, 1, 2, 4, NONE]), 5)
    torch.testing.assert_close(mass[0], torch.tensor([0, 0.6, 0.1, 0, 0.25], dtype=torch.float64), atol=1e-15, rtol=0)
    assert residual.item() == pytest.approx(0.05, abs=1e-15)
    assert float(mass.sum() + residual.sum()) == pytest.approx(1, abs=1e-15)


def test_mass_is_conserved_in_fp32_whatever_the_mapping() -> None:
    logits = 4 * random(7, 5000).float()
    students = torch.randint(-1, 900, (5000,), generator=torch.Generator().manual_seed(1))
    mass, residual = mapped_mass(logits, students, 800)  # ids from 800 on are none of the student's
    torch.testing.assert_close(mass.sum(-1) + residual, torch.ones(7), atol=1e-5, rtol=0)
    lost = (students < 0) | (students >= 800)
    torch.testing.assert_close(residual, logits.softmax(-1)[:, lost].sum(-1))
    assert residual.min() > 0.001


def test_o11_impossible_teacher_tokens_have_no_mass() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    mass, residual = mapped_mass(logits, torch.tensor([0, 0, 1, NONE]), 3)
    assert mass.tolist() == [[0.5, 0.5, 0.0]]
    assert residual.tolist() == [0.0]


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_bpm_with_an_identical_mapping_is_the_divergence_of_one_tokenizer(beta: float) -> None:
    teacher, student = random(6, 11), random(6, 11, seed=1)
    mass, residual = mapped_mass(teacher, torch.arange(11), 11)
    assert residual.tolist() == [0.0] * 6
    torch.testing.assert_close(
        mapped_divergence(mass, residual, student, beta),
        generalised_jsd(teacher, student, beta),
        atol=1e-14,
        rtol=1e-12,
    )


def test_bpm_forward_kl_by_hand() -> None:
    target = torch.tensor([[0.6, 0.0, 0.2]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    found = mapped_divergence(target, torch.tensor([0.2], dtype=torch.float64), student.log())
    assert found.item() == pytest.approx(0.8 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.2)), abs=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_bpm_gradient_by_finite_differences(beta: float) -> None:
    mass, residual = mapped_mass(random(3, 9), torch.tensor([0, 0, 1, 3, NONE, 3, 3, 4, 0]), 6)  # 2 and 5 get nothing
    student = random(3, 6, seed=2)

    def loss(logits: Tensor) -> Tensor:
        return mapped_divergence(mass, residual, logits, beta).sum()

    torch.testing.assert_close(gradient(loss, student), slope(loss, student), atol=1e-8, rtol=1e-6)


def test_bpm_forward_gradient_is_that_of_the_bare_sum() -> None:
    """`(1 - residual) p - t`: the residual takes nothing from, and gives nothing to, any token in proportion."""
    mass, residual = mapped_mass(random(3, 9), torch.tensor([0, 0, 1, 3, NONE, 3, 3, 4, 0]), 6)
    student = random(3, 6, seed=2)
    found = gradient(lambda logits: mapped_divergence(mass, residual, logits).sum(), student)
    torch.testing.assert_close(found, (1 - residual)[:, None] * student.softmax(-1) - mass)


def test_bpm_is_zero_where_the_student_is_the_target_in_proportion() -> None:
    mass, residual = mapped_mass(random(4, 9), torch.tensor([0, 0, 1, 3, NONE, 2, 3, 4, 0]), 5)
    student = mass.log() + 3.0  # a softmax of it is mass / (1 - residual)
    assert residual.min() > 0.01
    for beta in (0.0, 0.5):
        assert mapped_divergence(mass, residual, student, beta).abs().max() < 1e-14
        pull = gradient(lambda s, beta=beta: mapped_divergence(mass, residual, s, beta).sum(), student)
        assert pull.abs().max() < 1e-14


def test_bpm_has_no_reverse_kl() -> None:
    """Student tokens that nothing maps to have no target: the reverse KL would be infinite, or let the mass flee there."""
    mass, residual = mapped_mass(random(1, 3), torch.tensor([0, 0, 1]), 3)
    with pytest.raises(ValueError, match="infinite"):
        mapped_divergence(mass, residual, random(1, 3), 1.0)


def test_o11_a_row_that_is_all_residual_is_zero_without_a_gradient() -> None:
    mass, residual = mapped_mass(random(2, 3), torch.full((3,), NONE), 4)

    def loss(logits: Tensor) -> Tensor:
        return mapped_divergence(mass, residual, logits).sum()

    student = random(2, 4, seed=1)
    assert loss(student).item() == 0.0
    assert gradient(loss, student).abs().max() == 0.0


def test_o11_a_student_that_rules_out_what_the_teacher_never_says_stays_finite() -> None:
    """A padded output layer: ids of -inf on which the target has nothing."""
    mass, residual = mapped_mass(random(2, 3), torch.tensor([0, 1, NONE]), 4)
    student = random(2, 4, seed=1)
    student[:, 3] = -math.inf
    for beta in (0.0, 0.5):

        def loss(logits: Tensor, beta: float = beta) -> Tensor:
            return mapped_divergence(mass, residual, logits, beta).sum()

        short = mapped_divergence(mass[:, :3], residual, student[:, :3], beta)
        torch.testing.assert_close(loss(student), short.sum())
        assert gradient(loss, student).isfinite().all()


def test_gold_golden_merge() -> None:
    """p0 = (.6, .3, .1), p1 = (.05, .9, .05), tokens (0, 1): (.03, .54, .03), which adds up to p0[0] (the sheet's test 7)."""
    p = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.9, 0.05]], dtype=torch.float64)
    merged = bayesian_merge(p.log(), torch.tensor([0, 1]), [(0, 2)]).exp()
    torch.testing.assert_close(merged, torch.tensor([[0.03, 0.54, 0.03]], dtype=torch.float64), atol=1e-15, rtol=0)
    assert merged.sum().item() == pytest.approx(0.6, abs=1e-15)
    observed = (
        p[0] * p[1, 1]
    )  # row k times the probability of token k, though row k tells of token k + 1: TRL's default
    assert observed.tolist() == pytest.approx([0.54, 0.27, 0.09]) and float(observed.sum()) == pytest.approx(0.9)
    assert (merged[0] - observed).abs().max() > 0.2


def test_bayesian_merge_is_the_joint_probability_by_enumeration() -> None:
    """A model of two letters: the merged row of three tokens is the probability of the whole strings."""
    weights = random(7, 2).softmax(-1)  # next letter after "", a, b, aa, ab, ba, bb
    nodes = ["", *("".join(s) for n in (1, 2) for s in itertools.product("ab", repeat=n))]
    after = dict(zip(nodes, weights, strict=True))

    def probability(text: str) -> float:
        return math.prod(float(after[text[:i]]["ab".index(letter)]) for i, letter in enumerate(text))

    rows = torch.stack([after[""], after["b"], after["ba"]]).log()
    merged = bayesian_merge(rows, torch.tensor([1, 0, 0]), [(0, 3)])[0].exp()
    assert merged.tolist() == pytest.approx([probability("baa"), probability("bab")], abs=1e-15)


def test_bayesian_merge_of_groups_of_one_is_the_row_itself() -> None:
    logp = random(4, 6).log_softmax(-1)
    ids = torch.tensor([0, 5, 2, 1])
    assert torch.equal(bayesian_merge(logp, ids, [(t, t + 1) for t in range(4)]), logp)


def test_bayesian_merge_of_ragged_groups_against_a_loop() -> None:
    logp, ids = random(7, 5).log_softmax(-1), torch.tensor([0, 4, 2, 1, 3, 3, 0])
    groups = [(0, 1), (1, 4), (5, 7)]  # position 4 is in none
    slow = []
    for start, end in groups:
        row = logp[end - 1].exp()
        for t in range(start, end - 1):
            row = row * logp[t, ids[t]].exp()
        slow.append(row)
    torch.testing.assert_close(bayesian_merge(logp, ids, groups).exp(), torch.stack(slow))


def slow_gold(p: Tensor, q: Tensor, pairs: list[tuple[int, int]], beta: float) -> float:
    """One group by plain loops; all probabilities above the floor."""
    equal = 0.0
    for theirs, ours in pairs:
        a, b = float(q[theirs]), float(p[ours])
        m = beta * a + (1 - beta) * b
        equal += beta * a * math.log(a / m) + (1 - beta) * b * math.log(b / m)
    rest_p = sorted((float(x) for i, x in enumerate(p) if i not in {o for _, o in pairs}), reverse=True)
    rest_q = sorted((float(x) for i, x in enumerate(q) if i not in {t for t, _ in pairs}), reverse=True)
    rest = sum(abs(a - b) for a, b in itertools.zip_longest(rest_p, rest_q, fillvalue=0.0))
    weight = len(pairs) / len(q)
    return weight * equal + (1 - weight) * (rest if rest_p and rest_q else 0.0)


@pytest.mark.parametrize(("ours", "theirs"), [(6, 9), (9, 6), (7, 7)], ids=["teacher wider", "narrower", "equal"])
def test_gold_divergence_against_loops(ours: int, theirs: int) -> None:
    p, q = random(4, ours).softmax(-1) * 0.7, random(4, theirs, seed=1).softmax(-1) * 0.9
    pairs = [(0, 3), (2, 1), (5, 0)]
    found = gold_divergence(p.log(), q.log(), torch.tensor(pairs).T, 0.3)
    slow = torch.tensor([slow_gold(p[i], q[i], pairs, 0.3) for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(found, slow, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize(("beta", "same"), [(0.0, forward_kl), (1.0, reverse_kl), (0.5, None)])
def test_gold_neutral_is_the_generalised_jsd_bit_for_bit(beta: float, same: Callable | None) -> None:
    """Groups of one, all tokens matched."""
    teacher, student = random(5, 12).float(), random(5, 12, seed=1).float()
    everything = torch.arange(12).repeat(2, 1)
    groups = [(t, t + 1) for t in range(5)]
    own = bayesian_merge(student.log_softmax(-1), torch.zeros(5, dtype=torch.long), groups)
    found = gold_divergence(own, teacher.log_softmax(-1), everything, beta)
    assert torch.equal(found, same(teacher, student) if same else generalised_jsd(teacher, student, beta))


def test_gold_self_teacher_is_zero() -> None:
    logits, ids = random(6, 8), torch.tensor([0, 3, 2, 7, 5, 1])
    merged = bayesian_merge(logits.log_softmax(-1), ids, [(0, 2), (2, 3), (3, 6)])
    matched = torch.arange(5).repeat(2, 1)
    for beta in (0.0, 0.5, 1.0):
        assert gold_divergence(merged, merged, matched, beta).abs().max() < 1e-15


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gold_gradient_flows_through_the_scalars_too(beta: float) -> None:
    """By finite differences, on every logit of a group of three; the first two rows act through one probability each."""
    student, ids = random(4, 6), torch.tensor([1, 4, 0, 2])
    teacher = random(2, 8, seed=1).log_softmax(-1)
    matched = torch.tensor([[0, 3, 6], [2, 5, 1]])

    def loss(logits: Tensor) -> Tensor:
        merged = bayesian_merge(logits.log_softmax(-1), ids, [(0, 3), (3, 4)])
        return gold_divergence(merged, teacher, matched, beta).sum()

    found = gradient(loss, student)
    torch.testing.assert_close(found, slope(loss, student), atol=1e-8, rtol=1e-6)
    assert found[0].abs().max() > 1e-3


def test_o11_gold_stays_finite_where_probabilities_vanish() -> None:
    """The floor of 1e-8 is read in both logs, and what lies below it has no gradient."""
    student = torch.tensor([[0.0, -math.inf, -60.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -70.0, -math.inf, 1.0, -math.inf]], dtype=torch.float64)
    matched = torch.tensor([[0, 1, 2], [0, 1, 2]])

    def loss(logits: Tensor) -> Tensor:
        return gold_divergence(logits.log_softmax(-1), teacher.log_softmax(-1), matched, 0.5).sum()

    assert loss(student).item() == pytest.approx(
        0, abs=1e-12
    )  # the first and the last agree, the others are at the floor
    assert gradient(loss, student).isfinite().all()
    certain = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]], dtype=torch.float64)
    mixed = 0.5 * (1 + FLOOR)
    apart = gold_divergence(certain, certain.roll(1, -1), torch.arange(2).repeat(2, 1), 0.5, matched_weight=1.0)
    assert apart.item() == pytest.approx(FLOOR * math.log(FLOOR / mixed) + math.log(1 / mixed), abs=1e-12)


def test_uld_golden_distance() -> None:
    """(.5, .3, .2) against (.1, .7, .15, .05) is .5 (the sheet's test 9)."""
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.7, 0.15, 0.05]], dtype=torch.float64)
    # sorted: |.5 - .7| + |.3 - .15| + |.2 - .1| + |0 - .05|
    assert sorted_l1(p, q).item() == pytest.approx(0.5, abs=1e-15)
    assert sorted_l1(q, p).item() == pytest.approx(0.5, abs=1e-15)


def test_uld_does_not_care_which_token_is_which() -> None:
    p, q = random(3, 6).softmax(-1), random(3, 8, seed=1).softmax(-1)
    shuffled = p[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(sorted_l1(shuffled, q), sorted_l1(p, q))
    assert sorted_l1(shuffled, p).abs().max() < 1e-15


def test_uld_gradient_by_finite_differences() -> None:
    teacher, student = random(3, 8).softmax(-1), random(3, 5, seed=1)

    def loss(logits: Tensor) -> Tensor:
        return sorted_l1(logits.softmax(-1), teacher).sum()

    torch.testing.assert_close(gradient(loss, student), slope(loss, student), atol=1e-8, rtol=1e-6)


def test_o10_a_self_teacher_in_bf16_stays_below_1e_5() -> None:
    """A vocabulary of 50,000: the reductions are in fp32 once the logits are cast."""
    logp = (3 * random(2, 50_000)).bfloat16().float().log_softmax(-1)
    matched = torch.arange(40_000).repeat(2, 1)
    mass, residual = mapped_mass(logp, torch.arange(50_000), 50_000)
    assert gold_divergence(logp, logp, matched).abs().max() < 1e-5
    assert sorted_l1(logp.exp(), logp.exp()).abs().max() < 1e-5
    assert mapped_divergence(mass, residual, logp).abs().max() < 1e-5


# ------------------------------------------------------------------ BPM's residual as an outcome


def test_a_residual_is_held_against_what_no_teacher_token_maps_to() -> None:
    """Within a number that the teacher has ended: a digit too many costs what it would cost among two outcomes."""
    target = torch.tensor([[0.0, 0.02, 0.0, 0.0]], dtype=torch.float64)
    residual = torch.tensor([0.98], dtype=torch.float64)
    digits = torch.tensor([[True, True, False, False]])
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    p = logits.detach().softmax(-1)[0]
    expected = 0.02 * math.log(0.02 / p[1]) + 0.98 * math.log(0.98 / (p[2] + p[3]))
    found = mapped_divergence(target, residual, logits, mapped=digits)
    assert found.item() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    inside = p[2:] / p[2:].sum()  # the shape of the tail is the student's own
    torch.testing.assert_close(slope[0], p - torch.tensor([0, 0.02, *(0.98 * inside)], dtype=torch.float64))


def test_a_residual_beside_a_full_image_says_nothing() -> None:
    target, residual = torch.tensor([[0.3, 0.2, 0.1]]), torch.tensor([0.4])
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    every = torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(
        mapped_divergence(target, residual, logits, mapped=every), mapped_divergence(target, residual, logits)
    )


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_rows_with_and_without_a_telling_residual_do_not_touch_each_other(beta: float) -> None:
    draw = torch.Generator().manual_seed(1)
    mass = torch.rand(3, 5, generator=draw, dtype=torch.float64).softmax(-1)
    target, residual = mass[:, :4].clone(), mass[:, 4].clone()
    target[0] /= target[0].sum()
    residual[0] = 0
    image = torch.tensor([[True, True, False, True], [True] * 4, [True, True, True, False]])
    target[2, 3] = 0
    residual[2] = 1 - target[2].sum()
    logits = torch.randn(3, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    whole = mapped_divergence(target, residual, logits, beta, image)
    alone = [mapped_divergence(target[[i]], residual[[i]], logits[[i]], beta, image[[i]]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))
    assert torch.autograd.gradcheck(lambda x: mapped_divergence(target, residual, x, beta, image), logits)
