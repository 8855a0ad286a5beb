from __future__ import annotations

import math
import random

import pytest

from students.gap import gap

DICE = random.Random(0)
LOGPROBS = [-DICE.expovariate(1.0) for _ in range(1000)]


def test_s1_a_planted_offset_is_found() -> None:
    assert gap(LOGPROBS, LOGPROBS) is not None
    none = gap(LOGPROBS, LOGPROBS)
    assert none is not None and (none.mean, none.p99, none.tokens) == (0.0, 0.0, 1000)
    assert none.within(1e-9)
    shifted = gap([value + 0.02 for value in LOGPROBS], LOGPROBS)
    assert shifted is not None
    assert shifted.mean == pytest.approx(0.02) and shifted.p99 == pytest.approx(0.02)
    assert not shifted.within(1e-2) and shifted.within(0.03)


def test_s1_an_offset_on_two_tokens_in_a_hundred_shows_in_the_percentile_and_not_in_the_mean() -> None:
    some = [value - 0.5 * (place % 50 == 0) for place, value in enumerate(LOGPROBS)]
    found = gap(some, LOGPROBS)
    assert found is not None
    assert found.mean == pytest.approx(0.01) and found.p99 == pytest.approx(0.5)
    one = gap([LOGPROBS[0] - 9.0, *LOGPROBS[1:]], LOGPROBS)  # a single token is not the engine's fault
    assert one is not None and one.p99 == 0.0


def test_the_percentile_is_the_nearest_rank() -> None:
    for count in (1, 2, 99, 100, 101, 1000):
        differences = [float(place) for place in range(1, count + 1)]
        DICE.shuffle(differences)
        found = gap(differences, [0.0] * count)
        assert found is not None
        assert found.p99 == min(d for d in differences if sum(x <= d for x in differences) >= 0.99 * count)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_s1_what_is_no_number_is_never_within(broken: float) -> None:
    found = gap([broken, *LOGPROBS[1:]], LOGPROBS)
    assert found is not None and not found.within(1e9)


def test_nothing_to_compare_is_no_gap_and_not_a_gap_of_zero() -> None:
    assert gap([], []) is None
    with pytest.raises(ValueError, match="3 log-probs, the trainer 2"):
        gap([0.0] * 3, [0.0] * 2)


def test_its_fields_in_the_log() -> None:
    found = gap([0.0, -1.0], [0.0, -2.0])
    assert found is not None
    assert found.to_json() == {"gap_mean": 0.5, "gap_p99": 1.0, "gap_tokens": 2}
