"""TA-OPD: how teachable a token is, and which ones are kept."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from scored_by import scored, scores_of
from torch import Tensor

from omniopd.composition import compose
from omniopd.method import Method
from omniopd.parts.teachability import (
    C,
    D,
    TeachabilitySettings,
    by_tenth,
    disagreement_and_reach,
    kl_on,
    most_teachable,
    named,
    robust,
)
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView

P = [0.6, 0.3, 0.06, 0.03, 0.01]
SWAPPED = [0.3, 0.6, 0.06, 0.03, 0.01]
OFF = [0.06, 0.04, 0.6, 0.2, 0.1]


def built(student: Policy, control: str = "none", **part: Any) -> Method:
    config = {"name": "ta_opd", "control": control, "parts": [{"name": "teachability", **part}]}
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)


def rows_of(student: Policy, lengths: Sequence[int] = (13, 5, 0, 8)) -> list[Rollout]:
    torch.manual_seed(4)
    return [tiny.rollout(student, torch.randint(5, 200, (length,)).tolist()) for length in lengths]


def with_facts(student: Policy, scores: Sequence[Sequence[float]]) -> list[Rollout]:
    """Rollouts whose tokens have these scores as D, and the same C: all are equally teachable unless ranked by D alone."""
    rows = rows_of(student, [len(one) for one in scores])
    facts = [{D: tuple(one), C: tuple([0.5] * len(one))} for one in scores]
    return [replace(row, facts=own) for row, own in zip(rows, facts, strict=True)]


def read(method: Method, rows: Sequence[Rollout], step: int = 1) -> Signal:
    return method.read(rows, scores_of(method.audit(rows, step), lambda row, t: -1.0), step)


def logs(*probs: Sequence[float]) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def exact(p: Sequence[float], q: Sequence[float], k: int = 2) -> tuple[float, float]:
    d, c = disagreement_and_reach(logs(p), logs(q), k)
    return float(d), float(c)


# ------------------------------------------------------------------ the two numbers


@pytest.mark.parametrize(("q", "disagreement", "reach"), [(SWAPPED, 0.231049, 0.9), (OFF, 1.808892, 0.1)])
def test_the_sheets_disagreement_and_reach(q: Sequence[float], disagreement: float, reach: float) -> None:
    assert exact(P, q) == (pytest.approx(disagreement, abs=1e-6), pytest.approx(reach))


def test_the_smaller_disagreement_within_reach_wins() -> None:
    (inside, near), (outside, far) = exact(P, SWAPPED), exact(P, OFF)
    assert (inside * near, outside * far) == (pytest.approx(0.2079, abs=1e-4), pytest.approx(0.1809, abs=1e-4))
    assert inside < outside


def test_the_released_proxy_is_far_from_the_true_disagreement() -> None:
    """It knows of each side its own two ids only, and puts 1e-12 elsewhere after normalising."""
    proxy_p, proxy_q = [2 / 3, 1 / 3, 1e-12, 1e-12], [1e-12, 1e-12, 0.75, 0.25]
    assert float(kl_on(logs(proxy_q), logs(proxy_p))) == pytest.approx(27.068686, abs=1e-6)
    floored_p, floored_q = [0.6, 0.3, 1e-12, 1e-12], [1e-12, 1e-12, 0.6, 0.2]  # before normalising
    assert float(kl_on(logs(floored_q), logs(floored_p))) == pytest.approx(26.963325, abs=1e-6)
    assert exact(P, OFF)[0] < 2


def test_of_a_teacher_that_names_its_likeliest_ids_both_numbers_are_finite_and_reach_is_a_lower_bound() -> None:
    for q in (SWAPPED, OFF):
        logp, logq = logs(P), logs(q)
        top = {int(id): float(logq[0, id]) for id in logq[0].topk(2).indices}
        d, c = disagreement_and_reach(logp, named([top], logp), 2)
        assert 0 <= float(d) < 3
        assert float(c) <= exact(P, q)[1] + 1e-12
    assert float(c) == 0


def test_an_id_that_the_teacher_did_not_name_is_no_support_of_its() -> None:
    """Of one id named, the union is that id and the student's own two."""
    logp = logs(P)
    d, _ = disagreement_and_reach(logp, named([{2: math.log(0.6)}], logp), 2)
    assert float(d) == pytest.approx(-math.log(0.06 / 0.96))


def test_a_place_where_the_teacher_named_nothing_is_unknown() -> None:
    logp = logs(P, P)
    d, _ = disagreement_and_reach(logp, named([{}, {0: math.log(0.5), 1: math.nan}], logp), 2)
    assert d.isnan().tolist() == [True, False]


def test_reach_grows_with_k_up_to_one_and_equal_sides_do_not_disagree() -> None:
    torch.manual_seed(0)
    logp, logq = (torch.randn(40, 12, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = [disagreement_and_reach(logp, logq, k)[1] for k in (1, 2, 5, 12, 50)]
    assert all(bool((more >= less).all()) for less, more in pairwise([torch.zeros(40), *found]))
    torch.testing.assert_close(found[-1], torch.ones(40, dtype=torch.float64))
    assert bool((disagreement_and_reach(logp, logp, 3)[0] == 0).all())


def test_a_teacher_of_no_mass_in_the_students_support_has_no_reach() -> None:
    d, c = exact([0.5, 0.5, 1e-9, 1e-9], [0.0, 0.0, 0.7, 0.3])
    assert c == 0
    assert math.isfinite(d)


# ------------------------------------------------------------------ the choice


def test_the_normaliser_runs_from_one_quantile_to_the_other() -> None:
    found = robust(torch.arange(5), 0.05, 0.95)
    torch.testing.assert_close(
        found, torch.tensor([0, 0.222222, 0.5, 0.777778, 1], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert robust(torch.full((3,), 2.0), 0.05, 0.95).tolist() == [0, 0, 0]
    assert robust(torch.zeros(0), 0.05, 0.95).tolist() == []
    odd = robust(torch.tensor([0.0, math.nan, 1.0, math.inf]), 0.0, 1.0)
    assert odd.isnan().tolist() == [False, True, False, False]
    assert odd[[0, 2, 3]].tolist() == [0, 1, 1]


def test_earlier_tokens_win_ties() -> None:
    (kept,), filled = most_teachable([torch.tensor([0.5, 0.9, 0.5, 0.1])], 0.5, fill=True)
    assert kept.tolist() == [True, True, False, False]
    assert filled == 0


@pytest.mark.parametrize(
    ("rho", "tokens", "budget"), [(0.07, 100, 7), (0.05, 30, 2), (0.001, 30, 1), (0.5, 5, 3), (1, 4, 4)]
)
def test_the_budget_is_rounded_up_and_at_least_one(rho: float, tokens: int, budget: int) -> None:
    torch.manual_seed(0)
    (kept,), _ = most_teachable([torch.rand(tokens)], rho, fill=False)
    assert int(kept.sum()) == budget


def test_each_rollout_keeps_its_best_token_beyond_the_budget() -> None:
    scores = [torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.1, 0.3, 0.3]), torch.zeros(0), torch.tensor([math.nan])]
    kept, filled = most_teachable(scores, 0.3, fill=True)
    assert [mask.tolist() for mask in kept] == [[True, True, False], [False, True, False], [], [False]]
    assert filled == 1
    assert [int(mask.sum()) for mask in most_teachable(scores, 0.3, fill=False)[0]] == [2, 0, 0, 0]


def test_where_all_scores_are_alike_the_first_tokens_are_kept() -> None:
    kept, _ = most_teachable([torch.zeros(400), torch.zeros(400)], 0.5, fill=False)
    assert [mask.tolist() for mask in kept] == [[True] * 400, [False] * 400]


def test_shares_are_told_from_the_rollouts_beginning_to_its_end() -> None:
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[0, 1, 19]] = True
    assert by_tenth([mask]) == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0.5]
    assert by_tenth([]) == [None] * 10


# ------------------------------------------------------------------ the part


def test_the_best_tokens_of_the_step_are_learned_and_the_loss_is_divided_by_their_number(student: Policy) -> None:
    rows = with_facts(student, [[0.1, 4.0, 0.2, 0.3], [0.15, 0.25], []])
    rows[0] = replace(rows[0], facts={**rows[0].facts, C: (0.5, 0.9, 0.2, 0.9)})
    signal = read(built(student, rho=0.3, fill=False), rows)  # D C: of rank 2 is the last of the first rollout
    assert [mask.tolist() for mask in signal.mask_BT] == [[False, True, False, True], [False, False], []]
    assert signal.stats["teachability_filled"] == 0
    assert signal.stats["teachability_disagreement"] == pytest.approx(5 / 6)
    assert signal.coverage == 1

    trainer = Trainer(student, OptimizerSettings(), METHODS.get("opd").Config())
    loss = trainer.accumulate(rows, signal)["loss"]
    logp = torch.tensor(rows[0].logprobs)[[1, 3]]
    assert loss == pytest.approx(float((-(-1.0 - logp) * logp).sum()) / 2, rel=1e-4)


def test_what_is_ranked_by_is_a_setting(student: Policy) -> None:
    rows = with_facts(student, [[3.0, 2.0, 1.0, 0.0]])
    rows = [replace(rows[0], facts={**rows[0].facts, C: (0.0, 0.9, 1.0, 0.5)})]

    def first(rank_by: str) -> int:
        mask = read(built(student, rho=0.25, rank_by=rank_by, q_low=0.0, q_high=1.0), rows).mask_BT[0]
        return int(mask.nonzero()[0])

    assert [first(by) for by in ("teachable", "incompatible", "disagreement")] == [1, 0, 0]


def test_tokens_of_unknown_score_are_counted_and_never_learned(student: Policy) -> None:
    known = with_facts(student, [[0.1, math.nan, 0.3]])
    rows = [*known, *rows_of(student, [4])]  # the second was not measured
    signal = read(built(student, rho=0.9), rows)
    assert [mask.tolist() for mask in signal.mask_BT] == [[True, False, True], [False] * 4]
    assert signal.stats["teachability_unknown"] == 5


@pytest.mark.parametrize("facts", [[], [[]], [[0.5]], [[math.nan]]])
def test_a_step_of_hardly_any_tokens_makes_no_trouble(student: Policy, facts: list[list[float]]) -> None:
    signal = read(built(student), with_facts(student, facts))
    kept = sum(int(mask.sum()) for mask in signal.mask_BT)
    assert kept == sum(math.isfinite(number) for one in facts for number in one)
    assert all(bool(value.isfinite().all()) for value in signal.values_BT)


def test_the_control_keeps_as_many_tokens_of_each_rollout_elsewhere(student: Policy) -> None:
    random.seed(3)
    rows = with_facts(student, [[random.random() for _ in range(40)] for _ in range(3)])
    real, dealt = (read(built(student, control, rho=0.2), rows).mask_BT for control in ("none", "shuffled"))
    assert [int(mask.sum()) for mask in real] == [int(mask.sum()) for mask in dealt]
    assert any(not torch.equal(a, b) for a, b in zip(real, dealt, strict=True))


def kept_in(
    student: Policy, teacher: Policy, rows: Sequence[Rollout], groups: Sequence[Sequence[int]], **part: Any
) -> Signal:
    """The signal of a step whose rollouts are measured by several processes."""
    method = built(student, **part)
    found = {evidence.query.row: evidence for evidence in (scored(teacher, query) for query in method.audit(rows, 1))}
    measured = list(rows)
    for group in groups:
        own = {row: rows[row] for row in group}
        facts = method.measure(own, [found[row] for row in group if row in found], StudentView(student, own.values()))
        for row, numbers in facts.items():
            measured[row] = replace(rows[row], facts={name: tuple(numbers[name]) for name in numbers})
    return method.read(measured, list(found.values()), 1)


def test_the_kept_tokens_do_not_depend_on_who_measures(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, (13, 5, 0, 8, 11, 7))
    alone = kept_in(student, teacher, rows, [range(6)], rho=0.2)
    for groups in ([[0, 2, 4], [1, 3, 5]], [[row] for row in range(6)]):
        assert all(map(torch.equal, kept_in(student, teacher, rows, groups, rho=0.2).mask_BT, alone.mask_BT))
    assert 8 < sum(int(mask.sum()) for mask in alone.mask_BT) < 44


def test_what_is_measured_is_that_of_both_models(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, [9])
    method = built(student, k=4)
    (evidence,) = [scored(teacher, query) for query in method.audit(rows, 1)]
    facts = method.measure({0: rows[0]}, [evidence], StudentView(student, rows))[0]
    with torch.no_grad():
        whole = torch.tensor([[*rows[0].prompt_ids, *rows[0].ids]])
        p, q = (
            one.model(input_ids=whole).logits[0].softmax(-1)[len(rows[0].prompt_ids) - 1 : -1]
            for one in (student, teacher)
        )
    assert all(number == round(number, 6) for name in (D, C) for number in facts[name])  # noise decides no tie
    for t in range(9):
        own, theirs = (set(side[t].topk(4).indices.tolist()) for side in (p, q))
        union = sorted(own | theirs)
        a, b = q[t, union] / q[t, union].sum(), p[t, union] / p[t, union].sum()
        assert facts[D][t] == pytest.approx(float((a * (a / b).log()).sum()), rel=1e-3, abs=1e-5)
        assert facts[C][t] == pytest.approx(float(q[t, sorted(own)].sum()), rel=1e-3, abs=1e-5)


def test_likeliest_ids_are_enough_for_an_approximation_that_is_marked(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    true, near = (kept_in(student, teacher, rows, [range(4)], rho=0.3, exact=exact, k=8) for exact in (True, False))
    assert (true.stats["approximate"], near.stats["approximate"]) == (None, 1.0)
    assert near.stats["teachability_reach"] < true.stats["teachability_reach"]
    assert near.stats["teachability_unknown"] == 0
    assert built(student, exact=False).needs == {"topk", "score", "same tokenizer"}


def test_a_teacher_that_agrees_everywhere_keeps_the_first_tokens(student: Policy) -> None:
    rows = rows_of(student, (6, 6))
    signal = kept_in(student, student, rows, [range(2)], rho=0.5, fill=False)
    assert [mask.tolist() for mask in signal.mask_BT] == [[True] * 6, [False] * 6]
    assert signal.stats["teachability_disagreement"] == 0


def test_no_order_of_rows_moves_what_is_kept_even_where_scores_tie(student: Policy) -> None:
    scores = [[0.5, 0.9, 0.5], [0.5, 0.5], [0.5, 0.1, 0.5, 0.5]]
    rows = [
        replace(row, prompt=tiny.prompt(name=name))
        for row, name in zip(with_facts(student, scores), "bca", strict=True)
    ]
    order = [2, 0, 1]
    method = built(student, rho=0.4, fill=False, rank_by="disagreement")
    one, other = (read(method, chosen) for chosen in (rows, [rows[i] for i in order]))
    assert sum(int(mask.sum()) for mask in one.mask_BT) == 4  # of seven equals, three
    assert all(torch.equal(one.mask_BT[row], other.mask_BT[order.index(row)]) for row in range(3))
    assert one.mask_BT[2].tolist() == [True, False, True, True]  # "a" is the first prompt


def test_nor_does_who_measures_where_all_scores_tie(student: Policy) -> None:
    rows = rows_of(student, (6, 5, 6, 4))
    alone, apart = (kept_in(student, student, rows, groups, rho=0.3) for groups in ([range(4)], [[3], [1], [0, 2]]))
    assert all(map(torch.equal, alone.mask_BT, apart.mask_BT))


def test_tokens_that_are_masked_move_no_quantile(student: Policy) -> None:
    """Of the released code's defects: it counts them in."""
    scores = [[1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 1.5, 2.5]]
    method = built(student, rho=0.5, fill=False, rank_by="disagreement")

    def signal(masked: float) -> Signal:
        rows = with_facts(student, [*scores, [masked] * 6])
        found = scores_of(method.audit(rows, 1), lambda row, t: math.nan if row == 2 else -1.0)
        return method.read(rows, found, 1)

    for found in (signal(1e6), signal(-1e6)):
        kept = [mask.nonzero()[:, 0].tolist() for mask in found.mask_BT]
        assert kept == [[1, 2, 3], [3], []]  # ceil(rho N) of the eight that are valid, the largest
        assert found.stats["teachability_disagreement"] == pytest.approx(14.5 / 8)


def test_a_teacher_that_is_the_student_teaches_nothing_in_the_dense_form(student: Policy) -> None:
    rows = rows_of(student)
    config = {"name": "ta_opd", "form": "dense", "parts": [{"name": "teachability", "rho": 0.5}]}
    method = compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)
    evidence = [scored(student, query) for query in method.audit(rows, 1)]
    facts = method.measure(dict(enumerate(rows)), evidence, StudentView(student, rows))
    measured = [replace(row, facts={k: tuple(v) for k, v in facts.get(n, {}).items()}) for n, row in enumerate(rows)]
    signal = method.read(measured, evidence, 1)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    trainer.accumulate(measured, signal)
    assert 0 < sum(int(mask.sum()) for mask in signal.mask_BT) < sum(map(len, rows))
    assert max(float(p.grad.abs().max()) for p in trainer.trained if p.grad is not None) < 1e-6


def test_the_defaults_are_the_sheets() -> None:
    defaults = TeachabilitySettings()
    assert (defaults.k, defaults.rho, defaults.q_low, defaults.q_high) == (16, 0.05, 0.05, 0.95)
    assert defaults.exact and defaults.fill and defaults.rank_by == "teachable"


def test_quantiles_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="q_low: is not below q_high=0.3"):
        TeachabilitySettings(q_low=0.4, q_high=0.3)
