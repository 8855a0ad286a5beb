"""ROUGE-1 by hand."""

from __future__ import annotations

import pytest

from omniopd.scores.rouge1 import Rouge1, f1
from omniopd.types import Chunk, Reply


@pytest.mark.parametrize(
    ("a", "b", "phi"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "sat the Cat", 1.0),
        ("the cat sat", "the dog sat down", 2 * 2 / 7),
        ("the the cat", "the dog", 2 * 1 / 5),  # a word counts as often as both have it
        ("12+7=19", "12-7=19", 1.0),  # signs are no words
        ("12 + 7", "dog", 0.0),
        ("naïve 日本", "Naïve 日本", 1.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("+", "-", 0.0),
        ("+", " +", 1.0),
    ],
)
def test_f1(a: str, b: str, phi: float) -> None:
    assert f1(a, b) == pytest.approx(phi)
    assert f1(b, a) == pytest.approx(phi)


def test_scores_the_chunks_text() -> None:
    score = Rouge1(Rouge1.Config())
    assert score([(Chunk(0, 0, 1, "prefix", "a b", (3,)), Reply("a c", "stop"))]) == [0.5]
