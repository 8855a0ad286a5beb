"""What methods share that read scores: what they ask, where numbers land, and that no hole goes uncounted."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from scored_by import scores_of

from omniopd.alignment import AlignedChunk, Alignment
from omniopd.report.records import rollout_record
from omniopd.scored import Reading, Scored, ScoredObjective, finite, heard_chunks, likelihoods, nats
from omniopd.summary import step_row
from omniopd.types import AnswerQuery, Answers, Rollout, ScoreQuery, Signal, TokenScores
from students.policy import Policy

NAN, INF = math.nan, math.inf


class Plain(Scored):
    """The least that reads scores: the teacher's log-prob is the value."""

    needs = frozenset({"score"})

    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        teacher = nats(scores.logprobs)
        spoke, holes = finite(teacher)
        ratios = (teacher - nats(rollout.logprobs))[spoke]
        return Reading(spoke, teacher.where(spoke, 0.0), holes, log_ratios=ratios)


@pytest.fixture(scope="module")
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


@pytest.fixture(scope="module")
def rows(student: Policy) -> list[Rollout]:
    """A response that ends, one that was cut, and one of no tokens."""
    ids = student.encode("The answer is 19, so Tom has 😀.")[0]
    return [
        tiny.rollout(student, [*ids, student.end_id], tiny.prompt(name="a"), finish="stop"),
        tiny.rollout(student, ids[:7], tiny.prompt(name="b")),
        tiny.rollout(student, [], tiny.prompt(name="c")),
    ]


def method_of(student: Policy) -> Plain:
    return Plain(ScoredObjective(), student, 0)


def read(student: Policy, rows: Sequence[Rollout], logprob: Callable[[int, int], float]) -> Signal:
    method = method_of(student)
    return method.read(rows, scores_of(method.audit(rows, 1), logprob), 1)


def accounted(rows: Sequence[Rollout], signal: Signal) -> bool:
    """Every response token has a signal or a counted reason, and none has both."""
    heard = sum(int(mask.sum()) for mask in signal.mask_BT)
    return heard + signal.rejects.total() == sum(map(len, rows))


# ------------------------------------------------------------------ asking


def test_no_anchor_unless_asked_for_and_half_the_tokens_at_least(student: Policy) -> None:
    method = method_of(student)
    assert (method.objective.anchor.beta, method.min_coverage) == (0, 0.5)
    assert method.cautions() == []
    assert ScoredObjective(anchor={"beta": 0.2}).anchor.beta == 0.2


def test_each_response_with_tokens_is_asked_about_as_it_was_sampled(student: Policy, rows: list[Rollout]) -> None:
    first, second = method_of(student).audit(rows, 1)
    assert isinstance(first, ScoreQuery) and isinstance(second, ScoreQuery)
    assert (first.row, first.ids, first.closes) == (0, rows[0].ids, True)
    assert (second.row, second.ids, second.closes) == (1, rows[1].ids, False)
    assert (first.text, first.vocabulary) == (rows[0].text, student.vocabulary.digest)
    assert (first.top, first.whole) == (0, False)


def test_x4_half_a_character_at_the_end_is_no_text_to_score(student: Policy) -> None:
    smile = student.encode("so 😀")[0]
    cut = tiny.rollout(student, smile[:-1])
    (query,) = method_of(student).audit([cut], 1)
    assert "\ufffd" in cut.text
    assert query.text == "so "  # type: ignore[union-attr]
    assert query.ids == cut.ids  # type: ignore[union-attr]


def test_a_tokenizer_that_cannot_be_laid_over_bytes_sends_its_text_as_it_reads(
    student: Policy, rows: list[Rollout]
) -> None:
    """A teacher of the same vocabulary scores the ids as they are; no other is let in (`lacking`)."""
    lossy: Any = SimpleNamespace(digest="d", lossy="it writes capitals as small letters")
    method = Plain(ScoredObjective(), SimpleNamespace(vocabulary=lossy), 0)  # type: ignore[arg-type]
    query = method.query(rows[0], 0)
    assert (query.text, query.ids, query.vocabulary) == (rows[0].text, rows[0].ids, "d")


# ------------------------------------------------------------------ reading


def test_r1_a_canary_lands_on_its_own_token(student: Policy, rows: list[Rollout]) -> None:
    signal = read(student, rows, lambda row, t: -100.0 * row - t)
    for row, rollout in enumerate(rows):
        assert signal.values_BT[row].tolist() == [-100.0 * row - t for t in range(len(rollout))]
        assert signal.values_BT[row].dtype == torch.float32
        assert signal.mask_BT[row].all()


def test_r10_what_did_not_come_is_a_hole_with_a_reason(student: Policy, rows: list[Rollout]) -> None:
    signal = read(student, rows, lambda row, t: NAN if t == 2 else -INF if t == 4 else -1.0)
    assert signal.rejects == {"missing": 2, "infinite": 2}
    for mask, values in zip(signal.mask_BT[:2], signal.values_BT[:2], strict=True):
        assert (~mask).nonzero()[:, 0].tolist() == [2, 4]
        assert values[~mask].tolist() == [0, 0]
        assert values.isfinite().all()
    assert accounted(rows, signal)
    assert signal.drops == {}


def test_eight_5_every_query_is_heard_or_dropped_with_a_reason(student: Policy, rows: list[Rollout]) -> None:
    method = method_of(student)
    queries = method.audit(rows, 1)
    good = scores_of(queries, lambda row, t: -1.0)
    refused = TokenScores(queries[0], rejected={"too_long": 1})  # type: ignore[arg-type]
    holes = replace(good[1], logprobs=(*[NAN] * 4, *[-INF] * 3))
    for evidence, drops, rejects in [
        (good, {}, {}),
        ([refused, good[1]], {"too_long": 1}, {"too_long": len(rows[0])}),
        ([good[0], holes], {"missing": 1}, {"missing": 4, "infinite": 3}),
        ([refused, holes], {"too_long": 1, "missing": 1}, {"too_long": len(rows[0]), "missing": 4, "infinite": 3}),
    ]:
        signal = method.read(rows, evidence, 1)
        assert signal.drops == drops
        assert signal.rejects == rejects
        assert accounted(rows, signal)
        row = step_row(1, rows, [], signal, {}, Counter())
        assert row["responses"] + sum(row["drops"].values()) == len(queries)


def test_a_silent_step_has_no_numbers_but_reasons(student: Policy, rows: list[Rollout]) -> None:
    signal = read(student, rows, lambda row, t: NAN)
    assert signal.coverage == 0
    assert signal.stats["responses"] == 0
    assert signal.stats["mean_advantage"] is signal.stats["reverse_kl_k1"] is signal.stats["reverse_kl_k3"] is None


def test_evidence_of_another_kind_is_left_alone(student: Policy, rows: list[Rollout]) -> None:
    method = method_of(student)
    answer = Answers(AnswerQuery(rows[0].prompt, 0, 1, 8, 0), ())
    assert method.read(rows, [answer], 1).rejects == {}
    assert not any(mask.any() for mask in method.read(rows, [answer], 1).mask_BT)


def test_the_order_of_the_evidence_does_not_matter(student: Policy, rows: list[Rollout]) -> None:
    method = method_of(student)
    evidence = scores_of(method.audit(rows, 1), lambda row, t: -row - t / 7)
    one, other = method.read(rows, evidence, 1), method.read(rows, evidence[::-1], 1)
    assert all(torch.equal(a, b) for a, b in zip(one.values_BT, other.values_BT, strict=True))
    assert one.audits == other.audits


def test_golden_statistics(student: Policy) -> None:
    """Two tokens: log q - log p of -1 and 0.5; KL(student || teacher) by both estimators, in nats per token."""
    row = replace(tiny.rollout(student, student.encode("ab")[0][:2]), logprobs=(-0.5, -1.5))
    signal = read(student, [row], lambda row, t: (-1.5, -1.0)[t])
    k3 = (math.exp(-1) - 1 + 1 + math.exp(0.5) - 1 - 0.5) / 2
    assert signal.stats["responses"] == 1
    assert signal.stats["mean_advantage"] == pytest.approx(-1.25)
    assert signal.stats["reverse_kl_k1"] == pytest.approx(0.25)
    assert signal.stats["reverse_kl_k3"] == pytest.approx(k3)


@pytest.mark.parametrize(("bad", "warns"), [(0, False), (1, True)])
def test_many_log_probs_that_are_no_numbers_are_said_aloud(
    student: Policy, rows: list[Rollout], bad: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    read(student, rows, lambda row, t: NAN if t < bad else -1.0)
    assert ("missing or infinite" in caplog.text) == warns


def test_a_hole_without_a_reason_raises() -> None:
    mask = torch.tensor([True, False])
    Reading(mask, torch.zeros(2), {"missing": 1})
    with pytest.raises(ValueError, match="holes"):
        Reading(mask, torch.zeros(2), {})
    with pytest.raises(ValueError, match="values"):
        Reading(mask, torch.zeros(3), {"missing": 1})


# ------------------------------------------------------------------ chunks


def test_a_log_prob_that_is_no_number_costs_its_chunk_only(student: Policy) -> None:
    row = replace(tiny.rollout(student, [20, 21, 22, 23, 24]), logprobs=(-1.0, -2.0, -4.0, -8.0, -16.0))
    query = method_of(student).query(row, 0)
    scores = TokenScores(query, (1, 2, 3, 4, 5, 6), (None,) * 6, (-0.5, NAN, -INF, -0.25, -3.0, NAN))
    chunks = (AlignedChunk(0, 2, 0, 2), AlignedChunk(2, 3, 2, 4), AlignedChunk(3, 4, 4, 5))
    alignment = Alignment(chunks, {"unmatched": 1}, 5)
    heard, holes = heard_chunks(row, scores, alignment)
    assert heard == chunks[2:]
    assert holes == Counter(missing=2, infinite=1, unmatched=1)
    own, theirs = likelihoods(row, scores, heard)
    assert (own.tolist(), theirs.tolist()) == ([-8.0], [-3.0])


# ------------------------------------------------------------------ the report


def test_the_report_gets_every_token_with_its_value(student: Policy, rows: list[Rollout]) -> None:
    signal = read(student, rows, lambda row, t: NAN if t == 3 else -float(t))
    assert len(signal.audits) == 2
    for audit, rollout in zip(signal.audits, rows, strict=False):
        shown = rollout_record(json.loads(json.dumps(audit, allow_nan=False)))
        (chunk,) = shown["chunks"]
        assert "".join(chunk["tokens"]) == rollout.text
        assert chunk["values"] == [None if t == 3 else -float(t) for t in range(len(rollout))]
        assert (chunk["rejected"], chunk["dropped"], chunk["replies"]) == ({"missing": 1}, None, [])
    dropped = read(student, rows, lambda row, t: NAN).audits[0]["chunks"][0]
    assert (dropped["dropped"], dropped["score"]) == ("missing", None)
