"""What a teacher gives bytes: against enumerating every way in which it could have cut what follows."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch

from omniopd.boundary import byte_scores, openings_of
from omniopd.types import Message, Prompt, ScoreQuery, TokenScores

WORDS = (b"4", b"43", b"431", b"3", b".", b"=", b"")  # the last one ends a turn
END = len(WORDS) - 1


def scored(ids: Sequence[int], tables: Sequence[Sequence[float]], top: int = len(WORDS)) -> TokenScores:
    """The scores of these teacher tokens, of which each has a table of log-probs over `WORDS`; the last may end the turn."""
    text = b"".join(WORDS[id] for id in ids)
    query = ScoreQuery(Prompt("p", (Message("user", "?"),)), 0, (0,), "student", text.decode(), ids[-1] == END, top)
    likeliest = [dict(sorted(enumerate(table), key=lambda entry: -entry[1])[:top]) for table in tables]
    own = tuple(table[id] for table, id in zip(tables, ids, strict=True))
    return TokenScores(
        query,
        tuple(ids),
        tuple(itertools.accumulate(len(WORDS[id]) for id in ids)),
        own,
        tuple(likeliest),
        openings=tuple(openings_of(id, p, near, WORDS) for id, p, near in zip(ids, own, likeliest, strict=True)),
    )


def tables(count: int, seed: int = 0) -> list[list[float]]:
    draw = torch.randn(count, len(WORDS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * draw).log_softmax(-1).tolist()


def ends_of(pieces: Sequence[bytes]) -> list[int]:
    return list(itertools.accumulate(map(len, pieces)))


def test_a_number_that_ends_too_early_is_blamed_on_what_follows_it() -> None:
    """The teacher means 43; the student wrote "4" and "."."""
    sure = [math.log(0.01 / 5)] * len(WORDS)
    means_43, after = [*sure], [math.log(0.01 / 6)] * len(WORDS)
    means_43[0], means_43[1] = math.log(1e-6), math.log(0.99)
    after[4] = math.log(0.99)
    found = scored([0, 4], [means_43, after])
    four, stop = byte_scores(ends_of([b"4", b"."]), found, closes=False)
    assert found.logprobs[0] < -13  # at its word the teacher finds the right first digit impossible
    assert four == pytest.approx(math.log(0.99 + 1e-6 + 0.01 / 5))  # 4, 43 and 431
    assert stop < -13
    assert four + stop == pytest.approx(sum(found.logprobs) + found.openings[1][0] - found.logprobs[1])


def test_each_byte_of_a_longer_token_against_sums_over_the_vocabulary() -> None:
    (table,) = tables(1)
    found = scored([2], [table])  # 431
    mass = [sum(math.exp(p) for p, w in zip(table, WORDS, strict=True) if w[:n] == b"431"[:n]) for n in (1, 2, 3)]
    worth = byte_scores(ends_of([b"4", b"3", b"1"]), found, closes=False)
    assert worth == pytest.approx([math.log(mass[0]), math.log(mass[1] / mass[0]), math.log(mass[2] / mass[1])])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_student_cuts_a_closed_response_keeps_its_likelihood(seed: int) -> None:
    draw = random.Random(seed)
    ids = [*(draw.randrange(END) for _ in range(draw.randint(1, 8))), END]
    found = scored(ids, tables(len(ids), seed))
    size = found.ends[-1] or 0
    cuts = sorted({size, *(draw.randrange(1, size + 1) for _ in range(size))})
    worth = byte_scores([*cuts, size], found, closes=True)
    assert math.fsum(worth) == pytest.approx(math.fsum(found.logprobs))
    assert len(worth) == len(cuts) + 1


def test_with_tokens_that_open_no_longer_ones_bytes_are_worth_their_tokens() -> None:
    ids = [3, 4, 5, END]  # "3", ".", "=": no other word starts with them
    found = scored(ids, tables(4))
    assert byte_scores([1, 2, 3, 3], found, closes=True) == pytest.approx(list(found.logprobs))


def test_of_the_longer_tokens_only_those_that_came_are_known() -> None:
    (table,) = tables(1)
    every, few = scored([0], [table]), scored([0], [table], top=1)
    assert few.openings[0][0] <= every.openings[0][0]
    assert few.openings[0][0] >= table[0]


def test_r10_a_missing_number_costs_the_tokens_that_need_it() -> None:
    found = scored([3, 4, 5, 3], tables(4))
    holed = TokenScores(
        found.query,
        found.ids,
        found.ends,
        (found.logprobs[0], math.nan, *found.logprobs[2:]),
        openings=(found.openings[0], (math.nan,), *found.openings[2:]),
    )
    worth = byte_scores([1, 2, 3, 4], holed, closes=False)
    assert [math.isnan(value) for value in worth] == [False, True, True, False]  # the third is charged with its end


def test_x4_broken_stretches_and_tokens_of_no_width_have_no_number() -> None:
    found = scored([3, 4, 5], tables(3))
    assert [math.isnan(v) for v in byte_scores([1, None, 2, 2, 3], found, closes=False)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_a_space_that_the_tokenizer_put_before_the_text_is_read_past() -> None:
    """The token spells " 43" where the text has "43"."""
    spelled = (b" 43", b" 4", b"")
    opened = openings_of(0, math.log(0.5), {0: math.log(0.5), 1: math.log(0.25)}, spelled)
    query = ScoreQuery(Prompt("p", (Message("user", "?"),)), 0, (0,), "student", "43", False, 2)
    found = TokenScores(query, (0,), (2,), (math.log(0.5),), openings=(opened,))
    assert byte_scores([1, 2], found, closes=False) == pytest.approx([math.log(0.75), math.log(0.5 / 0.75)])
