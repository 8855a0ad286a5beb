"""The law of composition: what parts do to a draft comes to `A = m (w f(lr) + b)`, and its control keeps every histogram."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniopd.draft import Draft, weight_figures
from omniopd.objective import Objective
from omniopd.types import Branch, Rollout, Signal
from students.terms import coefficients

stable = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # whatever else the machine does
NUMBERS = st.floats(-5, 5, allow_nan=False, width=32)
WEIGHTS = st.one_of(st.just(0.0), st.floats(0, 4, width=32))


def rollout(tokens: int, name: str = "p") -> Rollout:
    zeros = (0.0,) * tokens
    return Rollout(tiny.prompt(name=name), (5,), tuple(range(tokens)), zeros, zeros, (), "", "stop")


def drafted(
    values: Sequence[Sequence[float]], heard: Sequence[Sequence[bool]] = (), shuffle: int | None = None, **signal: Any
) -> Draft:
    """A draft of such values [B][T], of which some are heard; a control where `shuffle` is a seed."""
    masks = tuple(torch.tensor(mask, dtype=torch.bool) for mask in heard or [[True] * len(row) for row in values])
    placed = tuple(torch.tensor(row) * mask for row, mask in zip(values, masks, strict=True))
    made = Signal(placed, masks, **signal)
    rollouts = [rollout(len(row), str(number)) for number, row in enumerate(values)]
    dealer = None if shuffle is None else random.Random(shuffle)
    return Draft.of(made, rollouts, [], 1, lambda one: len(one) % 2 == 0 if len(one) % 3 else None, dealer)


def exact(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def mean_loss_weight(signal: Signal, rollouts: Sequence[Rollout]) -> float:
    """`sum A / N` as the update scales it."""
    return float(coefficients(rollouts, signal, Objective()).value_R.double().sum())


# ------------------------------------------------------------------ golden numbers


def stack(bonus: bool = True) -> Draft:
    """FiRe weights, a TA mask, a Rock token and a bonus on one rollout, in the order of composition."""
    draft = drafted([[0.5, -1.0, 0.2, 0.0]])
    draft.keep(0, torch.tensor([True, True, False, True]))
    raw = exact(3, 1, 4, 2)
    draft.weigh(0, raw / raw[draft.mask[0]].mean())
    draft.weigh(0, exact(1, 0.1, 1, 1))
    if bonus:
        draft.add(0, exact(0, 0, 0, 0.3))
    return draft


def test_golden_stack() -> None:
    draft = stack()
    weight = draft.weight[0]
    assert weight is not None
    assert weight[draft.mask[0]].tolist() == pytest.approx([1.5, 0.05, 1.0])
    signal = draft.finish()
    assert signal.values_BT[0].tolist() == pytest.approx([0.75, -0.05, 0.0, 0.3])
    assert draft.tokens == 3
    assert mean_loss_weight(signal, draft.rollouts) == pytest.approx(1 / 3, abs=1e-6)
    assert signal.stats["effective_share"] == pytest.approx(0.666410, abs=5e-7)
    assert signal.stats["kept_share"] == 0.75


def test_golden_without_a_bonus_and_with_the_sum_of_weights_for_n() -> None:
    draft = stack(bonus=False)
    assert mean_loss_weight(draft.finish(), draft.rollouts) == pytest.approx(0.233333, abs=1e-6)
    draft.sum_w = True
    assert mean_loss_weight(draft.finish(), draft.rollouts) == pytest.approx(0.274510, abs=1e-6)


def test_golden_statistics_before_the_mask_give_another_loss() -> None:
    draft = drafted([[0.5, -1.0, 0.2, 0.0]])
    raw = exact(3, 1, 4, 2)
    draft.weigh(0, raw / raw[draft.mask[0]].mean())
    draft.keep(0, torch.tensor([True, True, False, True]))
    draft.weigh(0, exact(1, 0.1, 1, 1))
    draft.add(0, exact(0, 0, 0, 0.3))
    assert mean_loss_weight(draft.finish(), draft.rollouts) == pytest.approx(0.286667, abs=1e-6)


def test_golden_effective_share() -> None:
    assert weight_figures(exact(3, 3, 1))["effective_share"] == pytest.approx(0.859649, abs=5e-7)
    assert weight_figures(exact(0, 0)) == {
        "weight_mean": 0.0, "weight_min": 0.0, "weight_max": 0.0, "weight_zero_share": 1.0, "effective_share": 0.0,
    }  # fmt: skip
    assert set(weight_figures(exact()).values()) == {None}


# ------------------------------------------------------------------ the law, against its formula


@dataclass
class Case:
    """A step of ragged rollouts and what parts do to it, row by row, in any order."""

    values: list[list[float]]
    heard: list[list[bool]]
    deeds: list[tuple[str, int, list[float]]]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.values]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    values = [draw(st.lists(NUMBERS, min_size=n, max_size=n)) for n in lengths]
    heard = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    deeds = []
    for kind in draw(st.lists(st.sampled_from(["keep", "weigh", "add", "drop"]), max_size=6)):
        row = draw(st.integers(0, len(lengths) - 1))
        drawn = {"keep": st.sampled_from([0.0, 1.0]), "weigh": WEIGHTS, "add": NUMBERS, "drop": NUMBERS}[kind]
        deeds.append((kind, row, draw(st.lists(drawn, min_size=lengths[row], max_size=lengths[row]))))
    return Case(values, heard, deeds)


def do(draft: Draft, kind: str, row: int, numbers: Sequence[float]) -> None:
    """One deed of a part."""
    if kind == "keep":
        draft.keep(row, torch.tensor(numbers, dtype=torch.bool))
    elif kind == "weigh":
        draft.weigh(row, exact(*numbers))
    elif kind == "add":
        draft.add(row, exact(*numbers))
    else:
        draft.drop([row])


def by_hand(case: Case, row: int, t: int) -> tuple[bool, float]:
    """`m_t` and `A_t` of one token: masks are joined, weights multiplied, bonuses added and not weighed."""
    own = [(kind, numbers) for kind, at, numbers in case.deeds if at == row]
    mask = case.heard[row][t] and all(kind != "drop" and (kind != "keep" or numbers[t]) for kind, numbers in own)
    weight = prod(numbers[t] for kind, numbers in own if kind == "weigh")
    bonus = sum(numbers[t] for kind, numbers in own if kind == "add")
    return bool(mask), weight * case.values[row][t] + bonus if mask else 0.0


@stable
@given(cases())
def test_any_deeds_come_to_the_formula(case: Case) -> None:
    draft = drafted(case.values, case.heard)
    for deed in case.deeds:
        do(draft, *deed)
    signal = draft.finish()
    total, tokens = 0.0, 0
    for row, length in enumerate(case.lengths):
        expected = [by_hand(case, row, t) for t in range(length)]
        assert signal.mask_BT[row].tolist() == [mask for mask, _ in expected]
        assert signal.values_BT[row].tolist() == pytest.approx([value for _, value in expected], rel=1e-5, abs=1e-5)
        total += sum(value for _, value in expected)
        tokens += sum(mask for mask, _ in expected)
    assert mean_loss_weight(signal, draft.rollouts) == pytest.approx(
        total / tokens if tokens else 0, rel=1e-4, abs=1e-4
    )


@stable
@given(cases())
def test_a_draft_that_nothing_changes_keeps_its_bits(case: Case) -> None:
    draft = drafted(case.values, case.heard)
    signal = draft.finish()
    assert all(map(torch.equal, signal.values_BT, draft.signal.values_BT))
    assert all(map(torch.equal, signal.mask_BT, draft.signal.mask_BT))
    assert (signal.targets, signal.weights_BT, signal.branches, signal.branch_scale) == ((), (), (), 1.0)
    assert signal.coverage == draft.signal.coverage


@stable
@given(cases())
def test_coverage_is_what_the_teacher_spoke_about_whatever_is_learned_of_it(case: Case) -> None:
    draft = drafted(case.values, case.heard)
    before = draft.signal.coverage
    for deed in case.deeds:
        do(draft, *deed)
    signal = draft.finish()
    spoken, learned = sum(map(sum, case.heard)), sum(int(mask.sum()) for mask in signal.mask_BT)
    assert (signal.coverage, signal.spoken) == (before, spoken)
    assert signal.stats["kept_share"] == (learned / spoken if spoken else None)
    assert signal.stats["kept_rollouts"] == sum(bool(mask.any()) for mask in signal.mask_BT)


class Constant:
    """A divergence that is never asked for."""

    blocks = ()

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        raise NotImplementedError


def test_weights_multiply_a_divergence_and_masks_leave_it_out() -> None:
    draft = drafted([[0.0] * 3, [0.0] * 2, [0.5]], targets=(Constant(), Constant(), None))
    draft.weigh(0, exact(2, 0, 3))
    draft.divergence[0] = exact(0.5, 1, 1)
    draft.keep(0, torch.tensor([True, True, False]))
    signal = draft.finish()
    assert [weight.tolist() for weight in signal.weights_BT] == [[1, 0, 3], [1, 1], [1]]
    scaled = coefficients(draft.rollouts, signal, Objective())
    assert scaled.divergence_R.tolist() == pytest.approx([1 / 5, 0, 0, 1 / 5, 1 / 5, 0])
    assert scaled.value_R.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5 / 5])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1e-9])
def test_weights_that_are_no_weights_are_refused(wrong: float) -> None:
    draft = drafted([[1.0, 2.0]])
    with pytest.raises(ValueError, match="row 0"):
        draft.weigh(0, exact(1, wrong))
    assert draft.weight == [None]


def test_all_weights_0_and_empty_masks_are_finite() -> None:
    draft = drafted([[1.0, 2.0], []])
    draft.weigh(0, exact(0, 0))
    draft.sum_w = True
    assert draft.finish().values_BT[0].tolist() == [0, 0]
    draft.drop([0, 1])
    signal = draft.finish()
    assert signal.values_BT[0].tolist() == [0, 0] and signal.stats["effective_share"] is None
    assert (draft.tokens, draft.rows, signal.coverage) == (0, [], 1.0)


# ------------------------------------------------------------------ branches


@stable
@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0])), max_size=3),
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=3),
    st.sampled_from([0.1, 1.0, 2.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_further_branch_term_leaves_the_others_as_they_were(
    old: list[tuple[int, float]], new: list[tuple[int, float]], scale: float, before: float
) -> None:
    first = tuple(Branch(0, 0, tuple(range(tokens)), weight) for tokens, weight in old)
    further = [Branch(0, 0, tuple(range(tokens)), weight) for tokens, weight in new]
    draft = drafted([[1.0, 2.0]], branches=first, branch_scale=before)
    draft.branch(further, scale)
    signal = draft.finish()
    ours = coefficients(draft.rollouts, signal, Objective()).branch_Q.double()
    kept = old if len(signal.branches) == len(old) + len(new) else []
    assert kept or not old or not before
    expected = [*shares(kept, before), *shares(new, scale)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


def shares(branches: Sequence[tuple[int, float]], scale: float) -> list[float]:
    """Each token's part of `scale` times the weighted mean."""
    total = sum(tokens * weight for tokens, weight in branches)
    return [scale * weight / total for tokens, weight in branches for _ in range(tokens)]


# ------------------------------------------------------------------ control: shuffled


def learned(draft: Draft, kind: str, row: int) -> list[float]:
    """A rollout's weights or bonuses where it is learned, without their places."""
    numbers = (draft.weight if kind == "weigh" else draft.bonus)[row]
    return [] if numbers is None else sorted(numbers[draft.mask[row]].tolist())


@stable
@given(cases(), st.integers(0, 9))
def test_the_control_keeps_how_many_tokens_of_each_rollout_are_learned(case: Case, seed: int) -> None:
    real, control = drafted(case.values, case.heard), drafted(case.values, case.heard, shuffle=seed)
    for row, length in enumerate(case.lengths):
        mask = torch.tensor([t % 3 != row % 3 for t in range(length)], dtype=torch.bool)
        real.keep(row, mask)
        control.keep(row, mask)
        assert int(real.mask[row].sum()) == int(control.mask[row].sum())
        assert not bool((control.mask[row] & ~torch.tensor(case.heard[row], dtype=torch.bool)).any())


@stable
@given(cases(), st.integers(0, 9), st.sampled_from(["weigh", "add"]))
def test_the_control_keeps_the_histogram_of_each_rollout(case: Case, seed: int, kind: str) -> None:
    real, control = drafted(case.values, case.heard), drafted(case.values, case.heard, shuffle=seed)
    for row, length in enumerate(case.lengths):
        for draft in (real, control):
            do(draft, kind, row, [float(t) for t in range(length)])
        assert learned(real, kind, row) == learned(control, kind, row)


@stable
@given(cases(), st.integers(0, 9), st.data())
def test_the_control_drops_as_many_rollouts(case: Case, seed: int, data: st.DataObject) -> None:
    real, control = drafted(case.values, case.heard), drafted(case.values, case.heard, shuffle=seed)
    rows = data.draw(st.lists(st.integers(0, len(case.values) - 1), unique=True))
    real.drop(rows)
    control.drop(rows)
    assert len(real.rows) == len(control.rows)


@stable
@given(cases(), st.integers(0, 9), st.data())
def test_the_control_deals_lengths_to_rollouts_that_have_them(case: Case, seed: int, data: st.DataObject) -> None:
    cut = [row for row in range(len(case.values)) if data.draw(st.booleans())]
    lengths = {row: data.draw(st.integers(0, case.lengths[row])) for row in cut}
    real, control = drafted(case.values), drafted(case.values, shuffle=seed)
    real.cut(lengths)
    control.cut(lengths)
    shorter = sorted(length for row, length in lengths.items() if length < case.lengths[row])
    ends = [int(mask.sum()) for mask in control.mask]
    assert sorted(end for end, length in zip(ends, case.lengths, strict=True) if end < length) == shorter
    assert all(bool(mask[:end].all()) for mask, end in zip(control.mask, ends, strict=True))


@stable
@given(cases(), st.integers(0, 9))
def test_the_control_deals_verdicts_out_among_those_that_are_known(case: Case, seed: int) -> None:
    real, control = drafted(case.values, case.heard), drafted(case.values, case.heard, shuffle=seed)
    assert Counter(real.verdicts) == Counter(control.verdicts)
    unknown = [[row for row, one in enumerate(draft.verdicts) if one is None] for draft in (real, control)]
    assert unknown[0] == unknown[1]


def test_the_control_does_move_things() -> None:
    numbers = [float(t) for t in range(1, 21)]
    control = drafted([[1.0] * 20, [1.0] * 20, [1.0] * 20, [1.0] * 20], shuffle=3)
    control.weigh(0, exact(*numbers))
    control.keep(1, torch.arange(20) < 10)
    control.drop([3])
    weight = control.weight[0]
    assert weight is not None and weight.tolist() != numbers
    assert control.mask[1].tolist() != [True] * 10 + [False] * 10
    assert {tuple(drafted([[1.0] * n for n in (2, 4, 1, 5)], shuffle=seed).verdicts) for seed in range(9)} != {
        (True, True, False, False)
    }
