"""Golden numbers of normalised edit similarity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd.scores.edit_distance import CAP, EditDistance, similarity
from omniopd.types import Chunk, Reply


@pytest.mark.parametrize(
    ("a", "b", "phi"),
    [
        ("kitten", "sitting", 0.5714285714),
        ("flaw", "lawn", 0.5),
        ("x = 12", "x = 21", 0.6666666667),
        ("naïve café", "naive cafe", 0.8),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
    ],
)
def test_golden(a: str, b: str, phi: float) -> None:
    assert similarity(a, b) == pytest.approx(phi, abs=5e-11)


def slow(a: str, b: str) -> float:
    """Levenshtein by its recurrence."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row, above = [i], row
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return 1 - row[-1] / max(len(a), len(b), 1)


@given(st.text("ab😀 ", max_size=8), st.text("ab😀 ", max_size=8))
def test_equals_the_recurrence_symmetric_and_bounded(a: str, b: str) -> None:
    assert similarity(a, b) == pytest.approx(slow(a, b))
    assert similarity(a, b) == similarity(b, a)
    assert 0.0 <= similarity(a, b) <= 1.0


def test_each_side_is_capped() -> None:
    assert similarity("a" * CAP + "b" * 100, "a" * CAP + "c" * 900) == 1.0
    assert similarity("a" * (CAP - 1) + "b", "a" * (CAP - 1) + "c") < 1.0


def test_scores_the_chunks_text() -> None:
    score = EditDistance(EditDistance.Config())
    assert score([(Chunk(0, 0, 1, "prefix", "flaw", (4,)), Reply("lawn", "stop"))]) == [0.5]
