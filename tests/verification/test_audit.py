"""Judging in one batch, the chance floor and the placebo controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd.errors import ConfigError
from omniopd.scores.edit_distance import EditDistance
from omniopd.types import Chunk, Reply
from omniopd.verification.audit import Audit, ChunkSignal, Verdict, chance_floor, constant_values, judge_all, shuffled
from omniopd.verification.weights import calibrated

Pairs = Sequence[tuple[Chunk, Reply]]


def chunk_of(*pieces: str, closes: bool = False) -> Chunk:
    return Chunk(0, 0, len(pieces), "", "".join(pieces), tuple(accumulate(map(len, pieces))), closes)


def exact(pairs: Pairs) -> list[float]:
    return [float(chunk.text == reply.text) for chunk, reply in pairs]


def test_judge_all_scores_comparable_pairs_in_one_call() -> None:
    calls: list[Pairs] = []

    def score(pairs: Pairs) -> list[float]:
        calls.append(pairs)
        return exact(pairs)

    chunks = [chunk_of("1", "2"), chunk_of("3", "4")]
    replies = [[Reply("12+7", "length"), Reply("19", "stop")], [Reply("3", "length"), Reply("34", "stop")]]
    first, second = judge_all(chunks, replies, score)
    assert len(calls) == 1
    assert [(chunk.text, reply.text) for chunk, reply in calls[0]] == [
        ("12", "12"),
        ("12", "19"),
        ("3", "3"),
        ("34", "34"),
    ]
    assert (first.scores, first.k, first.n_eff) == ((1.0, 0.0), 1.0, 2)
    assert (first.survivors, first.at_risk) == ((2, 2, 1), (2, 2))
    assert (second.scores, second.survivors, second.at_risk) == ((1.0, 1.0), (2, 2, 1), (2, 1))
    assert second.replies == tuple(replies[1])


def test_l3_a_reply_that_says_nothing_leaves_k_and_n() -> None:
    (verdict,) = judge_all([chunk_of("12", "+")], [[Reply("1", "length"), Reply("12+", "stop")]], exact)
    assert (verdict.scores, verdict.n_eff, len(verdict.replies)) == ((1.0,), 1, 2)


def test_l4_all_refused_is_no_verdict() -> None:
    def never(pairs: Pairs) -> list[float]:
        raise AssertionError("nothing to score")

    (verdict,) = judge_all([chunk_of("1", "2")], [[]], never)
    assert (verdict.scores, verdict.at_risk, verdict.n_eff) == ((), (0, 0), 0)


@pytest.mark.parametrize(
    ("scores", "message"), [([], "1 pairs gave 0"), ([1.5], r"1\.5"), ([float("nan")], "nan"), ([-0.1], r"-0\.1")]
)
def test_a_broken_score_function_is_named(scores: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judge_all([chunk_of("1")], [[Reply("1", "stop")]], lambda pairs: scores)


def test_r11_chunks_and_replies_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge_all([chunk_of("1"), chunk_of("2")], [[Reply("1", "stop")]], exact)


PASSAGES = {
    "apples": "Tom buys 12 apples and 7 pears, so he has 19 fruits in all.",
    "trains": "The train leaves at noon and covers sixty miles every hour.",
    "garden": "Each row of the garden holds five tulips between two roses.",
}


def test_l2_the_floor_comes_from_other_prompts_and_calibrates_to_zero() -> None:
    chunks = [chunk_of(*text) for text in PASSAGES.values()] * 20
    replies = [[Reply(text, "stop")] for text in PASSAGES.values()] * 20
    score = EditDistance(EditDistance.Config())
    floor = chance_floor(chunks, replies, list(PASSAGES) * 20, score, seed=0)
    assert floor is not None
    assert 0.1 < floor < 0.4
    assert floor == chance_floor(chunks, replies, list(PASSAGES) * 20, score, seed=0)
    unrelated = [score([(chunk, replies[i - 1][0])])[0] for i, chunk in enumerate(chunks)]
    assert sum(calibrated(phi, floor) for phi in unrelated) / len(unrelated) < 0.05
    assert calibrated(score([(chunks[0], replies[0][0])])[0], floor) == 1.0


def test_l2_the_floor_never_meets_its_own_prompt() -> None:
    chunks, replies = [chunk_of("a"), chunk_of("a"), chunk_of("b")], [[Reply("a", "stop")]] * 2 + [[Reply("b", "stop")]]
    assert chance_floor(chunks, replies, ["p", "p", "q"], exact, seed=1) == 0.0
    assert chance_floor(chunks, replies, ["p", "p", "p"], exact, seed=1) is None
    assert chance_floor(chunks[1:], [[], replies[2]], ["p", "q"], exact, seed=1) == 0.0
    assert chance_floor([], [], [], exact, seed=1) is None


def audit(name: int) -> Audit:
    reply = Reply(str(name), "stop")
    return Audit(chunk_of(str(name)), (-1.0,), Verdict((name / 100,), (1, 1), (1,), (reply,)))


@given(st.integers(0, 12), st.integers(0, 1000))
def test_l19_shuffled_deals_every_verdict_to_another_chunk(count: int, seed: int) -> None:
    audits = [audit(i) for i in range(count)]
    placebo = shuffled(audits, seed)
    assert [a.chunk for a in placebo] == [a.chunk for a in audits]
    assert Counter(a.verdict for a in placebo) == Counter(a.verdict for a in audits)
    assert placebo == shuffled(audits, seed)
    if count > 1:
        assert all(after.verdict != before.verdict for after, before in zip(placebo, audits, strict=True))


def test_shuffling_depends_on_the_seed() -> None:
    audits = [audit(i) for i in range(10)]
    assert len({tuple(a.verdict for a in shuffled(audits, seed)) for seed in range(20)}) > 15


def test_l19_constant_values_keep_mask_and_mean() -> None:
    signals = [ChunkSignal((0.2, 0.4), (True, True)), ChunkSignal((0.9, 0.0), (True, False))]
    chunks = [chunk_of("a", "b"), chunk_of("c", "d")]
    placebo = constant_values(signals, chunks)
    assert [s.mask for s in placebo] == [s.mask for s in signals]
    assert placebo[0].values == pytest.approx((0.5, 0.5))
    assert placebo[1].values == pytest.approx((0.5, 0.0))
    assert constant_values([], []) == []


def test_l19_constant_texts_become_the_students_own() -> None:
    targets = ((Reply("x", "stop"), 2.0), (Reply("y", "length"), 1.0))
    signals = [ChunkSignal((0.0,), (True,), targets), ChunkSignal((0.0,), (False,))]
    first, second = constant_values(signals, [chunk_of("a"), chunk_of("b")])
    assert first.targets == ((Reply("a", "length"), 3.0),)
    assert second == signals[1]
    (closed,) = constant_values(signals[:1], [chunk_of("a", "", closes=True)])
    assert closed.targets == ((Reply("a", "stop"), 3.0),)
