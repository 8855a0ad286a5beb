"""Agreed tokens over tokens at risk, on comparable pairs."""

from __future__ import annotations

from itertools import accumulate

import pytest

from omniopd.registry import SCORES
from omniopd.scores.token_agreement import TokenAgreement
from omniopd.types import Chunk, Finish, Reply
from omniopd.verification.text import comparable

SCORE = TokenAgreement(TokenAgreement.Config())


def chunk_of(*pieces: str, closes: bool = False) -> Chunk:
    return Chunk(0, 0, len(pieces), "", "".join(pieces), tuple(accumulate(map(len, pieces))), closes)


@pytest.mark.parametrize(
    ("closes", "text", "finish", "phi"),
    [
        (False, "12+7", "stop", 1.0),
        (False, "12+7=19", "length", 1.0),
        (False, "12+8", "stop", 2 / 3),
        (False, "13+7", "stop", 0.0),  # one wrong digit, and edit distance would say 0.75
        (False, "12", "stop", 1 / 3),  # stopped early
        (False, "12+", "length", 1.0),  # censored: all that it could say agrees
        (False, "", "stop", 0.0),
        (True, "12+7", "stop", 1.0),
        (True, "12+7=", "stop", 3 / 4),  # went on where the student stopped
        (True, "12+7", "length", 1.0),  # whether it would have stopped is unknown
    ],
)
def test_share_of_agreed_tokens(closes: bool, text: str, finish: Finish, phi: float) -> None:
    chunk = chunk_of("12", "+", "7", *([""] if closes else []), closes=closes)
    assert SCORE([comparable(chunk, Reply(text, finish))]) == pytest.approx([phi])


def test_nothing_at_risk_scores_zero() -> None:
    assert SCORE([comparable(chunk_of("12"), Reply("", "length"))]) == [0.0]
    assert SCORE([]) == []


def test_built_in_scores_are_found_by_name() -> None:
    names = {"token_agreement", "edit_distance", "rouge1", "embedding"}
    assert names <= set(SCORES.names())
    for name in names:
        assert SCORES.get(name).Config().name == name
