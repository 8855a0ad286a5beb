"""LGR: the bonus of confident branches, its sign in the update, and what is asked for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from scored_by import scored

from omniopd.chat import ChatTemplate
from omniopd.composition import Composed, compose
from omniopd.errors import ConfigError
from omniopd.losses import token_nll
from omniopd.method import Method
from omniopd.parts.lookahead import EPS, LEAST_STD, LookaheadSettings, repetition, standardised
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.store import Store
from omniopd.types import Query, Rollout, ScoreQuery, Signal, TokenScores
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from teachers.asks import Manner
from teachers.given import passage
from teachers.transformers import TransformersConfig, TransformersTeacher

GROUP = torch.tensor([0.9, 0.5, 0.5, 0.1], dtype=torch.float64)


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def built(student: Policy, **settings: Any) -> Method:
    part = {"name": "lookahead", "min_tokens": 0, "tau": 0.0, "k": 4, **settings}
    return compose(TypeAdapter(tagged(METHODS)).validate_python({"name": "lgr", "parts": [part]}), student, 0)


@torch.no_grad()
def written(student: Policy, ids: Sequence[int], finish: str = "length", k: int = 4) -> Rollout:
    """A rollout with the student's k likeliest tokens at each place."""
    row = tiny.rollout(student, ids, finish=finish)
    logits = student.model(input_ids=torch.tensor([[*row.prompt_ids, *ids]])).logits[0]
    best = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1).topk(k)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return replace(row, top=tuple(tuple(zip(*pair, strict=True)) for pair in pairs))


def rows_of(student: Policy) -> list[Rollout]:
    torch.manual_seed(4)
    rows = [written(student, torch.randint(5, 200, (length,)).tolist()) for length in (9, 1, 4)]
    return [*rows, written(student, [17, 18, student.end_id], "stop")]


def confident(queries: Sequence[Query], rows: Sequence[Rollout], own: float, other: float) -> list[TokenScores]:
    """A teacher with the student's log-probs that is so sure after the sampled token, and after any other candidate."""
    found = []
    for query in queries:
        assert isinstance(query, ScoreQuery)
        sure = other if query.by else own
        logprobs = rows[query.row].logprobs if not query.by else (-1.0,) * len(query.ids)
        top = ({7: math.log(sure)},) * len(query.ids)
        found.append(TokenScores(query, query.ids, (None,) * len(query.ids), logprobs, top))
    return found


def read(method: Method, rows: Sequence[Rollout], teacher: Policy) -> Signal:
    return method.read(rows, [scored(teacher, query) for query in method.audit(rows, 1)], 1)


# ------------------------------------------------------------------ the bonus


def test_golden_confidences() -> None:
    population = [1.414214, 0, 0, -1.414214]
    assert standardised(GROUP, eps=0).tolist() == pytest.approx(population, abs=1e-6)
    assert standardised(GROUP).tolist() == pytest.approx([1.414209, 0, 0, -1.414209], abs=1e-6)
    assert standardised(GROUP).tolist() != pytest.approx([1.224741, 0, 0, -1.224741], abs=1e-3)  # the sample's


def test_confidences_know_no_shift_nor_scale_and_add_up_to_nothing() -> None:
    torch.testing.assert_close(standardised(GROUP / 2 + 0.1, eps=0), standardised(GROUP, eps=0))
    assert standardised(GROUP).sum().item() == pytest.approx(0, abs=1e-12)
    assert standardised(GROUP[[3, 1, 0, 2]]).tolist() == standardised(GROUP)[[3, 1, 0, 2]].tolist()


@pytest.mark.parametrize("group", [[0.5], [0.5, 0.5], [0.5, 0.5 + 1e-5]])
def test_one_confidence_is_no_reason_for_a_bonus(group: list[float]) -> None:
    assert not standardised(torch.tensor(group, dtype=torch.float64)).any()


def test_golden_sign_a_confident_branch_gains() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    token_nll(logits.log_softmax(-1)[:, 0], torch.tensor([1.414214])).backward()
    after = (logits - 0.1 * logits.grad).log_softmax(-1)[0, 0].item()

    assert logits.log_softmax(-1)[0, 0].item() == pytest.approx(-1.098612, abs=1e-6)
    assert after == pytest.approx(-1.006587, abs=1e-6)


def test_repetition_counts_runs_that_stood_there_before() -> None:
    assert repetition([(1, 2, 3, 4, 1, 2, 3, 4)]) == pytest.approx(1 / 5)
    assert repetition([(1, 2, 3)]) is None


# ------------------------------------------------------------------ what is asked


def test_each_candidate_is_two_tokens_behind_the_prefix(student: Policy) -> None:
    rows = rows_of(student)
    queries = [query for query in built(student).audit(rows, 1) if isinstance(query, ScoreQuery) and query.by]

    for row, rollout in enumerate(rows):
        for t in range(len(rollout)):
            candidates = [q.ids[0] for q in queries if q.row == row and len(q.after) == t]
            likeliest = [v for v, _ in rollout.top[t] if v != rollout.ids[t] and v not in student.end_ids]
            assert candidates == (likeliest if t < len(rollout) - 1 else [])
    assert all(query.after == rows[query.row].ids[: len(query.after)] and query.top == 1 for query in queries)


def test_only_unsure_places_of_long_enough_rollouts_are_looked_at(student: Policy) -> None:
    rows = rows_of(student)
    tau = sorted(rows[0].entropy)[4]
    asked = {len(q.after) for q in built(student, tau=tau).ask(rows[0], 0, 1) if isinstance(q, ScoreQuery) and q.by}

    assert asked == {t for t in range(len(rows[0]) - 1) if rows[0].entropy[t] > tau} != set()
    assert len(built(student, min_tokens=10).audit(rows, 1)) == len(rows)  # the scores alone
    assert "less than 10 tokens" in built(student, min_tokens=10).cautions()[0]


def test_scores_behind_a_prefix_are_those_of_the_whole_text(student: Policy, teacher: Policy) -> None:
    rollout = rows_of(student)[0]
    query = next(q for q in built(student).ask(rollout, 0, 1) if isinstance(q, ScoreQuery) and len(q.after) == 5)
    whole = replace(query, ids=(*query.after, *query.ids), after=(), text="")

    assert scored(teacher, query).logprobs == pytest.approx(scored(teacher, whole).logprobs[-2:], abs=1e-4)
    manner = Manner("t", "raw", None, None, None, vocabulary=query.vocabulary)
    chat = ChatTemplate(tiny.byte_level())
    behind, read = passage(manner.ask(query), chat), passage(manner.ask(whole), chat)
    assert (*behind.prompt_ids, *behind.ids) == (*read.prompt_ids, *read.ids)
    assert behind.ids == query.ids
    other = replace(query, after=(*query.after[:-1], 9))
    assert manner.ask(query).keys() != manner.ask(other).keys()


@pytest.fixture
def backend(tiny_folder: Callable[..., Path], tmp_path: Path) -> Iterator[TransformersTeacher]:
    """The same teacher as a back end: its queries padded together in batches."""
    config = TransformersConfig(path=str(tiny_folder(seed=1)))
    made = TransformersTeacher(config, Store(tmp_path / "answers.sqlite"))
    yield made
    asyncio.run(made.close())


def confidences(backend: TransformersTeacher, queries: Sequence[ScoreQuery]) -> list[float]:
    """r of each query's first token: the largest probability behind it."""
    return [math.exp(max(one.top[-1].values())) for one in asyncio.run(backend.gather(queries))]  # type: ignore[union-attr]


def test_a_back_ends_confidences_are_those_of_naive_forward_passes_and_of_nobody_else(
    student: Policy, teacher: Policy, backend: TransformersTeacher
) -> None:
    """Batched requests against one pass per candidate; permuted with the candidates; blind to one another."""
    queries = [q for q in built(student).audit(rows_of(student), 1) if isinstance(q, ScoreQuery) and q.by]
    found = confidences(backend, queries)
    for query, sure in zip(queries, found, strict=True):
        before = torch.tensor([[*teacher.prompt_ids(query.prompt), *query.after, query.ids[0]]])
        with torch.no_grad():
            naive = teacher.model(input_ids=before).logits[0, -1].softmax(-1).max().item()
        assert sure == pytest.approx(naive, abs=1e-4)
    assert confidences(backend, queries[::-1]) == pytest.approx(found[::-1], abs=1e-6)
    changed = [replace(queries[0], ids=(9, queries[0].ids[1])), *queries[1:]]
    others = confidences(backend, changed)
    assert others[1:] == pytest.approx(found[1:], abs=1e-6)
    assert others[0] != pytest.approx(found[0], abs=1e-3)


def test_the_order_of_candidates_moves_no_bonus(student: Policy, teacher: Policy) -> None:
    method, rows = built(student, k=3), rows_of(student)
    turned = [replace(row, top=tuple((*reversed(top[:3]), *top[3:]) for top in row.top)) for row in rows]
    one, other = read(method, rows, teacher), read(method, turned, teacher)
    for a, b in zip(one.values_BT, other.values_BT, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_the_sampled_token_is_of_its_group_also_where_it_is_none_of_the_likeliest(student: Policy) -> None:
    rollout = rows_of(student)[0]
    t = next(t for t in range(8) if rollout.ids[t] not in dict(rollout.top[t][:4]))
    asked = [q for q in built(student).ask(rollout, 0, 1) if isinstance(q, ScoreQuery) and q.by and len(q.after) == t]
    assert len(asked) == 4  # K + 1 with y_t, whose confidence the scores of the response tell


def test_the_gate_is_the_entropy_that_was_recorded(student: Policy) -> None:
    """That of the weights that wrote, so that every epoch over a batch looks at the same places."""
    rollout = replace(rows_of(student)[0], entropy=(0.1, 0.3, 0.2, 5.0, 0.0, 0.1, 0.1, 0.1, 9.0))
    asked = built(student, tau=0.2).ask(rollout, 0, 1)
    assert {len(q.after) for q in asked if isinstance(q, ScoreQuery) and q.by} == {1, 3}


# ------------------------------------------------------------------ neutral and default settings


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"tau": math.inf}])
def test_a_neutral_setting_leaves_the_part_out(student: Policy, settings: dict[str, float]) -> None:
    rows = rows_of(student)
    method = built(student, **settings)
    assert not isinstance(method, Composed)
    assert not any(query.by for query in method.audit(rows, 1))


def test_one_candidate_that_was_sampled_is_plain_distillation(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    greedy = [written(student, [row.top[0][0][0] for _ in row.ids]) for row in rows]
    greedy = [replace(row, top=tuple(((v, p),) for v, p in zip(row.ids, row.logprobs, strict=True))) for row in greedy]
    one, plain = (read(built(student, k=1, gamma=gamma), greedy, teacher) for gamma in (1.0, 0.0))
    assert not any(query.by for query in built(student, k=1).audit(greedy, 1))
    assert all(map(torch.equal, one.values_BT, plain.values_BT))


def test_the_defaults_are_the_sheets(student: Policy) -> None:
    defaults = LookaheadSettings()
    assert (defaults.k, defaults.tau, defaults.gamma, defaults.clip) == (8, 0.2, 1.0, 2.0)
    assert defaults.min_tokens == 4096
    assert (EPS, LEAST_STD) == (1e-6, 1e-4)


# ------------------------------------------------------------------ the update


def test_a_teacher_that_is_the_student_still_has_a_bonus(student: Policy) -> None:
    """So the student is no fixed point; and text that repeats itself is told in the log."""
    rows = [written(student, [9, 10, 11, 12, 9, 10, 11, 12])]
    plain, found = (read(built(student, gamma=gamma), rows, student) for gamma in (0.0, 1.0))
    assert plain.values_BT[0].abs().max() < 1e-5
    assert found.values_BT[0][:-1].abs().max() > 0.1
    assert found.stats["repetition"] == pytest.approx(1 / 5)
    assert found.stats["lookahead_share"] == pytest.approx(7 / 8)


@pytest.mark.parametrize(("own", "other", "sign"), [(0.9, 0.1, 1), (0.1, 0.9, -1), (0.5, 0.5, 0)])
def test_where_the_teacher_agrees_the_bonus_alone_moves_the_sampled_token(
    student: Policy, own: float, other: float, sign: int
) -> None:
    rows = [rows_of(student)[0]]
    method = built(student)
    signal = method.read(rows, confident(method.audit(rows, 1), rows, own, other), 1)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    trainer.accumulate(rows, signal)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight -= 0.02 * weight.grad if weight.grad is not None else 0
    before, after = (sum(row.logprobs[:-1]) for row in (rows[0], tiny.rollout(student, rows[0].ids)))

    assert signal.values_BT[0][-1] == 0
    assert [math.copysign(1, v) if v else 0 for v in signal.values_BT[0][:-1].tolist()] == [sign] * 8
    assert (after > before, after < before) == (sign > 0, sign < 0)


def test_an_end_of_the_response_is_no_candidate(student: Policy) -> None:
    rollout = rows_of(student)[0]
    top = tuple(((student.end_id, -1.0), *place[1:]) for place in rollout.top)
    asked = [q for q in built(student).ask(replace(rollout, top=top), 0, 1) if isinstance(q, ScoreQuery) and q.by]

    assert asked and student.end_id not in {q.ids[0] for q in asked}


@torch.no_grad()
def test_the_bonus_is_that_of_naive_forward_passes(student: Policy, teacher: Policy) -> None:
    rollout = rows_of(student)[0]
    plain, found = (read(built(student, gamma=gamma, clip=9.0), [rollout], teacher) for gamma in (0.0, 1.0))
    bonus = (found.values_BT[0] - plain.values_BT[0]).tolist()

    for t in range(len(rollout) - 1):
        likeliest = [v for v, _ in rollout.top[t] if v not in student.end_ids]
        group = [rollout.ids[t], *(v for v in likeliest if v != rollout.ids[t])]
        before = [*rollout.prompt_ids, *rollout.ids[:t]]
        logits = torch.stack([teacher.model(input_ids=torch.tensor([[*before, v]])).logits[0, -1] for v in group])
        sure = logits.double().softmax(-1).max(-1).values
        expected = ((sure - sure.mean()) / (sure.std(correction=0) + 1e-6))[0].item()
        assert bonus[t] == pytest.approx(expected, abs=1e-4)


def test_the_bonus_is_clipped_scaled_by_gamma_and_added_to_the_log_ratio(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    plain = read(built(student, gamma=0), rows, teacher)
    one, half = (read(built(student, gamma=gamma), rows, teacher) for gamma in (1.0, 0.5))
    bonus = [a - b for a, b in zip(one.values_BT, plain.values_BT, strict=True)]

    assert all(bool(b.isfinite().all()) and float(b.abs().max()) <= 2 for b in bonus)
    assert bonus[0][:-1].abs().min() > 0 and bonus[1].tolist() == [0] and bonus[3][-1] == 0
    for b, h, p in zip(bonus, half.values_BT, plain.values_BT, strict=True):
        torch.testing.assert_close(h - p, b / 2, atol=1e-5, rtol=1e-4)
    clipped = read(built(student, clip=0.01), rows, teacher)
    assert (clipped.values_BT[0] - plain.values_BT[0]).abs().max().item() == pytest.approx(0.01, abs=1e-6)


def test_a_flat_teacher_that_is_peaked_behind_one_candidate_still_tells_branches_apart(student: Policy) -> None:
    rows = [rows_of(student)[0]]
    method = built(student)
    found = confident(method.audit(rows, 1), rows, 0.01, 0.01)
    peaked = [
        replace(one, top=({7: math.log(0.99)},) * 2)
        if one.query.by and one.query.ids[0] == rows[0].top[len(one.query.after)][1][0]
        else one
        for one in found
    ]

    assert method.read(rows, peaked, 1).values_BT[0].any()
    assert not method.read(rows, found, 1).values_BT[0].any()


def test_a_candidate_of_which_nothing_came_leaves_its_group(student: Policy) -> None:
    rows = [rows_of(student)[0]]
    method = built(student)
    found = confident(method.audit(rows, 1), rows, 0.9, 0.1)
    holes = [TokenScores(one.query, rejected={"timeout": 1}) if one.query.by else one for one in found]

    assert not method.read(rows, holes, 1).values_BT[0].any()


def test_a_horizon_is_refused(student: Policy) -> None:
    config = {"name": "lgr", "parts": [{"name": "lookahead"}, {"name": "horizon"}]}
    with pytest.raises(ConfigError, match="can't be joined"):
        compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)
