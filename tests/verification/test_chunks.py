"""Where chunks are, and what they look like as text."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd.types import Chunk, Finish, Prompt, Rollout
from omniopd.verification.chunks import cut_chunk, random_starts, select_starts, steps, thresholds

SHEET = [0.1, 0.9, 0.8, 0.2, 1.5, 0.3, 1.5, 0.2, 0.7, 0.6, 2.0, 0.4]


def rollout(*pieces: str, finish: Finish = "length") -> Rollout:
    """A rollout whose tokens complete these pieces of text; "" is a token that completes nothing."""
    zeros = (0.0,) * len(pieces)
    ends = tuple(accumulate(map(len, pieces)))
    return Rollout(Prompt("p", ()), (), tuple(range(len(pieces))), zeros, zeros, ends, "".join(pieces), finish)


def span(*ends: int, text: str, closes: bool = False) -> Chunk:
    return Chunk(0, 0, len(ends), "", text, ends, closes)


@pytest.mark.parametrize(
    ("entropy", "count", "length", "starts"),
    [
        (SHEET, 3, 3, [1, 6, 9]),
        (SHEET, 3, 5, [1, 6]),
        (SHEET, 3, 13, []),
        ([1.0] * 10, 3, 3, [1, 4, 7]),
        (SHEET, 1, 3, [6]),  # the first to be picked, so that sorting did not hide the order
        (SHEET, 2, 3, [1, 6]),
        (SHEET, 0, 3, []),
        ([], 3, 1, []),
        ([0.5], 3, 1, [0]),
    ],
)
def test_selector_golden(entropy: list[float], count: int, length: int, starts: list[int]) -> None:
    assert select_starts(entropy, count, length) == starts


def brute_force(entropy: list[float], count: int, length: int) -> list[int]:
    """The rule as a sentence: again and again, the best of all starts that still fit."""
    chosen: list[int] = []
    while len(chosen) < count:
        taken = {t for start in chosen for t in range(start, start + length)}
        fits = [t for t in range(len(entropy)) if t + length <= len(entropy) and not taken & set(range(t, t + length))]
        if not fits:
            break
        chosen.append(max(fits, key=lambda t: (entropy[t], t)))
    return sorted(chosen)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=14), st.integers(0, 5), st.integers(1, 6))
def test_l11_selector_equals_brute_force(entropy: list[float], count: int, length: int) -> None:
    starts = select_starts(entropy, count, length)
    assert starts == brute_force(entropy, count, length)
    assert all(later - earlier >= length for earlier, later in pairwise(starts))
    assert all(start + length <= len(entropy) for start in starts)


@pytest.mark.parametrize("peak", range(8))
def test_l9_the_chunk_opens_with_the_uncertain_token(peak: int) -> None:
    """Entropy at t belongs to the distribution that produced token t, so token t is the chunk's first."""
    entropy = [float(t == peak) for t in range(10)]
    (start,) = select_starts(entropy, 1, 3)
    assert start == peak
    assert cut_chunk(rollout(*"abcdefghij"), 0, start, 3).text == "abcdefghij"[peak : peak + 3]


def test_random_starts_are_seeded_valid_and_even() -> None:
    assert random_starts(50, 4, 5, seed=1) == random_starts(50, 4, 5, seed=1)
    assert len({tuple(random_starts(50, 4, 5, seed=s)) for s in range(20)}) > 15
    starts = random_starts(50, 4, 5, seed="step/3")
    assert len(starts) == 4
    assert starts[-1] + 5 <= 50
    assert min(b - a for a, b in pairwise(starts)) >= 5
    counts = Counter(random_starts(10, 1, 4, seed=s)[0] for s in range(3500))
    assert sorted(counts) == list(range(7))
    assert all(abs(count - 500) < 5 * 500**0.5 for count in counts.values())


def test_l15_trailing_white_space_moves_to_the_chunk() -> None:
    chunk = cut_chunk(rollout("so", " \n", "\t", "12", "+7"), 3, 3, 2)
    assert (chunk.prefix, chunk.text, chunk.ends) == ("so", " \n\t12+7", (5, 7))
    assert (chunk.row, chunk.start, chunk.end) == (3, 3, 5)


@given(st.lists(st.text("a \n\u3000é😀", max_size=3), min_size=1, max_size=12), st.data())
def test_l15_prefix_and_chunk_rebuild_the_text(pieces: list[str], data: st.DataObject) -> None:
    written = rollout(*pieces)
    start = data.draw(st.integers(0, len(pieces) - 1))
    length = data.draw(st.integers(1, len(pieces) - start))
    chunk = cut_chunk(written, 0, start, length)
    assert chunk.prefix + chunk.text == "".join(pieces[: start + length])
    assert chunk.prefix == "".join(pieces[:start]).rstrip()
    assert [chunk.text[:end] for end in chunk.ends] == [
        "".join(pieces[: t + 1])[len(chunk.prefix) :] for t in range(start, start + length)
    ]


def test_a_prefix_never_ends_inside_a_character() -> None:
    chunk = cut_chunk(rollout("a", "", "", "😀", "b"), 0, 2, 3)  # three pieces of the emoji, the last completes it
    assert (chunk.prefix, chunk.text, chunk.ends) == ("a", "😀b", (0, 1, 2))


@pytest.mark.parametrize(("finish", "start", "closes"), [("stop", 1, True), ("stop", 0, False), ("length", 1, False)])
def test_only_the_last_token_of_a_stopped_response_closes(finish: Finish, start: int, closes: bool) -> None:
    assert cut_chunk(rollout("a", "b", "", finish=finish), 0, start, 2).closes is closes


@pytest.mark.parametrize(("start", "length"), [(2, 2), (-1, 2), (0, 0), (0, 4)])
def test_a_chunk_outside_the_response_is_refused(start: int, length: int) -> None:
    with pytest.raises(ValueError, match="3 tokens"):
        cut_chunk(rollout("a", "b", "c"), 0, start, length)


@pytest.mark.parametrize(
    ("chunk", "needed", "grouped"),
    [
        (span(1, 3, text="abc"), (1, 3), [range(1), range(1, 2)]),
        (span(1, 1, 1, 2, text="a😀"), (1, 2, 2, 2), [range(1), range(1, 4)]),
        (span(0, 1, text="é"), (1, 1), [range(2)]),
        (span(1, 1, text="a"), (1,), [range(1)]),  # nothing in the chunk decides the last token
        (span(1, 1, text="a", closes=True), (1, 2), [range(1), range(1, 2)]),
        (span(1, 1, 1, text="a", closes=True), (1, 2, 2), [range(1), range(1, 3)]),
        (span(0, text="", closes=True), (1,), [range(1)]),
        (span(0, text=""), (), []),
    ],
)
def test_tokens_of_one_character_are_decided_together(
    chunk: Chunk, needed: tuple[int, ...], grouped: list[range]
) -> None:
    assert thresholds(chunk) == needed
    assert steps(chunk) == grouped
