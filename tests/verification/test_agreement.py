"""How far replies agree, in the student's tokens, and what a censored reply can say."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd.types import Chunk, Finish, Reply
from omniopd.verification.agreement import agreed, agreed_tokens, spoken, survival_counts
from omniopd.verification.text import BROKEN, comparable


def chunk_of(*pieces: str, closes: bool = False) -> Chunk:
    """A chunk whose tokens complete these pieces; "" completes nothing, as the closing token does."""
    return Chunk(0, 0, len(pieces), "", "".join(pieces), tuple(accumulate(map(len, pieces))), closes)


OPEN = chunk_of("12", "+", "7=")
CLOSED = chunk_of("12", "+", "7", "", closes=True)
EMOJI = chunk_of("a", "", "", "😀", "b")


@pytest.mark.parametrize(
    ("chunk", "text", "finish", "expected"),
    [
        (OPEN, "12+7=19", "stop", (3, 3)),
        (OPEN, "12+7=", "length", (3, 3)),
        (OPEN, "12+8=20", "length", (2, 3)),
        (OPEN, "1+7=", "stop", (0, 3)),  # agreement inside a token is none
        (OPEN, "12", "stop", (1, 3)),  # stopped early: the teacher would not go on
        (OPEN, "12", "length", (1, 1)),  # cut: it said nothing about the rest
        (OPEN, "12+7", "length", (2, 2)),  # cut inside the third token
        (OPEN, "19", "length", (0, 1)),
        (OPEN, "9", "length", (0, 0)),  # it differs, but agreement at this length would not have counted either
        (OPEN, "", "stop", (0, 3)),
        (OPEN, "", "length", (0, 0)),
        (CLOSED, "12+7", "stop", (4, 4)),
        (CLOSED, "12+7", "length", (3, 3)),  # stopping or going on: unknown
        (CLOSED, "12+7=19", "length", (3, 4)),  # it went on, so it disagrees with the end
        (CLOSED, "12+7=19", "stop", (3, 4)),
        (CLOSED, "12+", "stop", (2, 4)),
        (chunk_of("", closes=True), "", "stop", (1, 1)),
        (chunk_of("", closes=True), "x", "stop", (0, 1)),
        (EMOJI, "a😀b", "length", (5, 5)),
        (EMOJI, "a😁b", "length", (1, 5)),  # nothing tells which piece of the emoji differs: none is agreed with
        (EMOJI, "a", "length", (1, 1)),
        (EMOJI, "a" + BROKEN, "length", (1, 1)),
        (chunk_of("a", ""), "ab", "stop", (1, 1)),  # nothing in the chunk decides the last token
        (chunk_of(""), "ab", "stop", (0, 0)),
    ],
)
def test_agreed_tokens(chunk: Chunk, text: str, finish: Finish, expected: tuple[int, int]) -> None:
    assert agreed_tokens(chunk, Reply(text, finish)) == expected


PIECES = st.lists(st.sampled_from(["", "a", "b", "ab", "😀"]), min_size=1, max_size=6)
SAID = st.builds(Reply, st.text("ab😀", max_size=8), st.sampled_from(["stop", "length"]))


@given(PIECES, st.booleans(), SAID)
def test_agreement_is_the_same_on_the_comparable_pair(pieces: list[str], closes: bool, reply: Reply) -> None:
    """Cutting to equal length neither gains nor loses a token, and leaves nothing unknown."""
    chunk = chunk_of(*pieces, *([""] if closes else []), closes=closes)
    shorter, cut_reply = comparable(chunk, reply)
    assert agreed(shorter, cut_reply) == agreed(chunk, reply)
    assert agreed(chunk, reply) <= spoken(chunk, reply)
    assert spoken(shorter, Reply(cut_reply.text, "stop")) == spoken(chunk, reply)


@given(PIECES, st.booleans(), st.lists(SAID, max_size=8))
def test_survival_counts_equal_a_plain_count(pieces: list[str], closes: bool, replies: list[Reply]) -> None:
    chunk = chunk_of(*pieces, *([""] if closes else []), closes=closes)
    survivors, at_risk = survival_counts(chunk, replies)
    told = [agreed_tokens(chunk, reply) for reply in replies]
    tokens = len(chunk.ends)
    assert survivors == tuple(len([1 for a, _ in told if a >= j]) for j in range(tokens + 1))
    assert at_risk == tuple(len([1 for a, r in told if a >= j and r >= j + 1]) for j in range(tokens))
    assert survivors[0] == len(replies)
    assert all(s >= r >= after for s, r, after in zip(survivors, at_risk, survivors[1:], strict=False))


@given(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=6), st.lists(st.text("ab", max_size=8)))
def test_without_censoring_the_survivors_are_at_risk(pieces: list[str], texts: list[str]) -> None:
    survivors, at_risk = survival_counts(chunk_of(*pieces), [Reply(text, "stop") for text in texts])
    assert at_risk == survivors[:-1]


def test_l3_a_censored_reply_leaves_those_at_risk() -> None:
    replies = [Reply("12+7=", "length"), Reply("12", "length"), Reply("12+9", "stop")]
    assert survival_counts(OPEN, replies) == ((3, 3, 2, 1), (3, 2, 2))


def test_no_replies_nobody_at_risk() -> None:
    assert survival_counts(OPEN, []) == ((0, 0, 0, 0), (0, 0, 0))
