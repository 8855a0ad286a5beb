"""Rewards by group and on tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny

from omniopd.groups import by_prompt, centred, dealt, normalised, normaliser, reward_signal
from students.policy import Policy

DISCRIMINATED = (0.1, 0.4, -0.2, 0.9)


def test_golden_normalised_with_either_deviation() -> None:
    population = (-0.49236596, 0.24618298, -1.23091491, 1.47709789)
    sample = (-0.42640143, 0.21320072, -1.06600358, 1.27920430)
    assert normalised(DISCRIMINATED) == pytest.approx(population, abs=1e-8)
    assert normalised(DISCRIMINATED, "sample") == pytest.approx(sample, abs=1e-8)
    assert normaliser("sample")(DISCRIMINATED) == normalised(DISCRIMINATED, "sample")


def test_golden_centred() -> None:
    assert centred((2 / 3, 1 / 3, 1.0, 0.0)) == pytest.approx((1 / 6, -1 / 6, 0.5, -0.5), abs=1e-12)


@pytest.mark.parametrize("compare", [centred, normalised, normaliser("sample")])
@pytest.mark.parametrize("rewards", [(0.7,), (1.0, 1.0), (0.1 + 0.2, 0.3, 0.3), (2 / 3,) * 7])
def test_a_group_without_contrast_has_advantage_zero(compare, rewards) -> None:  # type: ignore[no-untyped-def]
    assert compare(rewards) == [0.0] * len(rewards)


@pytest.fixture(scope="module")
def student(tiny_folder) -> Policy:  # type: ignore[no-untyped-def]
    folder: Path = tiny_folder()
    return tiny.policy(folder)


def test_an_unknown_reward_enters_no_mean_and_masks_its_rollout(student: Policy) -> None:
    a, b = tiny.prompt(name="a"), tiny.prompt(name="b")
    rows = [tiny.rollout(student, [7] * n, p) for n, p in ((3, a), (2, b), (4, a), (0, a), (5, a), (2, b))]
    rewards = [1.0, None, 0.0, 0.5, None, 1.0]
    signal = reward_signal(rows, rewards, centred, drops={"no verdict": 2})
    values = [value.tolist() for value in signal.values_BT]
    assert values == [[0.5] * 3, [0.0] * 2, [-0.5] * 4, [], [0.0] * 5, [0.0] * 2]
    masks = [mask.tolist() for mask in signal.mask_BT]
    assert masks == [[True] * 3, [False] * 2, [True] * 4, [], [False] * 5, [True] * 2]
    assert signal.stats["reward_mean"] == pytest.approx(0.625) and signal.stats["reward_known"] == 4
    assert signal.stats["groups_without_contrast"] == 1 and signal.drops == {"no verdict": 2}
    silent = reward_signal(rows, [None] * 6, centred)
    assert not any(mask.any() for mask in silent.mask_BT) and silent.stats["reward_mean"] is None


def test_the_order_of_rows_changes_nothing(student: Policy) -> None:
    prompts = [tiny.prompt(name=name) for name in "abab"]
    rows = [tiny.rollout(student, [7, 8], prompt) for prompt in prompts]
    rewards = [0.3, 0.9, 0.1, 0.2]
    order = [3, 0, 2, 1]
    one = reward_signal(rows, rewards, normalised)
    other = reward_signal([rows[i] for i in order], [rewards[i] for i in order], normalised)
    assert [other.values_BT[place].tolist() for place in range(4)] == [one.values_BT[i].tolist() for i in order]
    assert by_prompt(dict(enumerate(rows))) == {"a": [0, 2], "b": [1, 3]}


def test_what_is_dealt_out_never_stays_where_it_was() -> None:
    names = list("abcdef")
    for seed in range(50):
        given = dealt(names, random.Random(seed))
        assert sorted(given) == sorted(given.values()) == names
        assert not any(name == other for name, other in given.items())
    assert dealt(["a"], random.Random(0)) == {"a": "a"} and dealt([], random.Random(0)) == {}
