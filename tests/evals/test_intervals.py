"""Intervals: reproducible, never a point, and as often right as they say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from evals.intervals import Difference, bootstrap_interval, paired_difference, pooled_difference
from omniopd.errors import DataError


def _answers(right: int, n: int) -> list[bool]:
    return [True] * right + [False] * (n - right)


def test_the_same_seed_gives_the_same_interval() -> None:
    answers = _answers(260, 500)
    assert bootstrap_interval(answers, 3) == bootstrap_interval(answers, 3)
    assert bootstrap_interval(answers, 3) != bootstrap_interval(answers, 4)
    assert bootstrap_interval(answers, -1)


def test_half_right_of_500() -> None:
    low, high = bootstrap_interval(_answers(250, 500), 0)
    assert low == pytest.approx(0.456, abs=0.006) and high == pytest.approx(0.544, abs=0.006)


def test_the_multinomial_draw_is_the_plain_bootstrap() -> None:
    answers = np.array(_answers(130, 200))
    picks = np.random.default_rng(0).integers(0, 200, size=(20_000, 200))
    plain = np.quantile(answers[picks].mean(axis=1), [0.025, 0.975])
    assert bootstrap_interval(list(answers), 0, resamples=20_000) == pytest.approx(tuple(plain), abs=0.006)


@pytest.mark.parametrize("n", [1, 5, 500])
@pytest.mark.parametrize("share", [0, 1])
def test_all_alike_is_no_point(n: int, share: int) -> None:
    low, high = bootstrap_interval([bool(share)] * n, 0)
    assert high - low > 0.005 and low <= share <= high
    change = paired_difference([False] * n, [bool(share)] * n, 0)
    assert change.high - change.low > 0.005 and change.low <= change.mean <= change.high
    assert change.low >= -1 and change.high <= 1


def test_the_bounds_rise_with_the_accuracy() -> None:
    intervals = [bootstrap_interval(_answers(right, 500), 0) for right in range(0, 501, 5)]
    for (low, high), (next_low, next_high) in pairwise(intervals):
        assert low <= next_low + 0.004 and high <= next_high + 0.004


def test_pairing_is_narrower_than_it_looks() -> None:
    before = _answers(250, 500)
    after = _answers(275, 500)
    change = paired_difference(before, after, 0)
    assert change == paired_difference(before, after, 0)
    assert change.mean == pytest.approx(0.05) and 0.03 < change.low < 0.05 < change.high < 0.08
    back = paired_difference(after, before, 0)
    assert back.mean == pytest.approx(-0.05) and back.high < 0


def test_errors() -> None:
    with pytest.raises(DataError, match="no answers to measure"):
        bootstrap_interval([], 0)
    with pytest.raises(DataError, match="2 answers before and 1 after"):
        paired_difference([True, False], [True], 0)
    with pytest.raises(DataError, match="same prompts"):
        paired_difference([], [], 0)


@pytest.mark.parametrize(("p", "n"), [(0.5, 500), (0.8, 100), (0.97, 300), (0.995, 500), (0.05, 60)])
def test_accuracy_coverage(p: float, n: int) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(400):
        low, high = bootstrap_interval(_answers(int(rng.binomial(n, p)), n), trial, resamples=1000)
        hits += low <= p <= high
    assert 0.91 <= hits / 400 <= 0.995  # 95 % up to the binomial's steps and three standard errors


@pytest.mark.parametrize(
    ("lost", "won", "n"), [(0.1, 0.2, 500), (0.02, 0.03, 300), (0.0, 0.05, 100), (0.01, 0.01, 200)]
)
def test_difference_coverage(lost: float, won: float, n: int) -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(400):
        kinds = rng.choice([-1, 0, 1], size=n, p=[lost, 1 - lost - won, won])
        change: Difference = paired_difference(list(kinds == -1), list(kinds == 1), trial, resamples=1000)
        hits += change.low <= won - lost <= change.high
    assert hits / 400 >= 0.91


def test_one_seed_is_the_paired_difference() -> None:
    before, after = _answers(250, 500), _answers(275, 500)
    assert pooled_difference([before], [after], 3) == paired_difference(before, after, 3)


def test_seeds_that_repeat_each_other_do_not_count_as_new_prompts() -> None:
    rng = np.random.default_rng(0)
    before, after = (list(rng.random(300) < share) for share in (0.5, 0.6))
    one = paired_difference(before, after, 0)
    three = pooled_difference([before] * 3, [after] * 3, 0)
    assert three.mean == pytest.approx(one.mean)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_that_differ_make_the_interval_wider() -> None:
    rng = np.random.default_rng(1)
    before = [list(rng.random(300) < 0.5) for _ in range(3)]
    alike = [list(rng.random(300) < 0.6) for _ in range(3)]
    apart = [list(rng.random(300) < share) for share in (0.4, 0.6, 0.8)]
    narrow, wide = (pooled_difference(before, after, 0) for after in (alike, apart))
    assert wide.mean == pytest.approx(narrow.mean, abs=0.05)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_the_pooled_interval_is_the_plain_bootstrap_of_seeds_and_prompts() -> None:
    rng = np.random.default_rng(2)
    before, after = (rng.random((3, 80)) < share for share in (0.5, 0.65))
    change = after.astype(int) - before.astype(int)
    seeds, prompts = rng.integers(0, 3, (20_000, 3)), rng.integers(0, 80, (20_000, 80))
    plain = np.quantile([change[s][:, p].mean() for s, p in zip(seeds, prompts, strict=True)], [0.025, 0.975])
    found = pooled_difference(before.tolist(), after.tolist(), 0, resamples=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(plain), abs=0.006)


def test_pooled_seeds_of_which_hardly_a_prompt_changed_are_no_point() -> None:
    same = [_answers(50, 100)] * 3
    found = pooled_difference(same, same, 0)
    assert found.mean == 0 and found.low < -0.005 and found.high > 0.005


@pytest.mark.parametrize(
    ("before", "after"),
    [([[True]], [[True, False]]), ([[True]], []), ([[]], [[]]), ([[True], [True, True]], [[True]] * 2)],
)
def test_seeds_of_other_prompts_are_refused(before: list[list[bool]], after: list[list[bool]]) -> None:
    with pytest.raises(DataError, match="measure all on the same"):
        pooled_difference(before, after, 0)
