"""SCOPE: routed by verdict, weighed by perplexity; golden numbers of the paper's figure, and the real update."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from scored_by import scored, scores_of
from torch import Tensor

from omniopd.composition import compose
from omniopd.method import Method
from omniopd.parts.correctness_router import group_weights
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import Prompt, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

RIGHT = torch.tensor([1.2, 2.6, 3.8], dtype=torch.float64)  # perplexities of the paper's figure
WRONG = torch.tensor([4.5, 2.9, 1.7], dtype=torch.float64)
GOLDEN = [
    (0.5, [0.0636, 0.2986, 0.6378], [0.0960, 0.2312, 0.6728]),
    (1.0, [0.1579, 0.3421, 0.5000], [0.1924, 0.2985, 0.5092]),
    (2.0, [0.2352, 0.3462, 0.4186], [0.2582, 0.3217, 0.4201]),
]
HIGH, LOW = "up_weight_high_ppl", "up_weight_low_ppl"


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def rows_of(student: Policy, marks: str, group: int = 2) -> list[Rollout]:
    """A rollout per mark, `group` of each prompt: + is right, - wrong, ? has no reference, | was cut."""
    torch.manual_seed(4)
    rows = []
    for place, mark in enumerate(marks):
        asked = replace(tiny.prompt(name=f"p{place // group}"), reference=None if mark == "?" else "19")
        ids = torch.randint(5, 200, (4 + 3 * place % 7,)).tolist()
        finish = "length" if mark == "|" else "stop"
        row = tiny.rollout(student, [*ids, student.end_id], asked, finish)
        rows.append(replace(row, text="right" if mark == "+" else "wrong"))
    return rows


def built(student: Policy, **config: Any) -> Method:
    def right(prompt: Prompt, text: str) -> bool:
        return text == "right"

    return compose(TypeAdapter(tagged(METHODS)).validate_python({"name": "scope", **config}), student, 0, right, 2)


def routed(**settings: Any) -> dict[str, Any]:
    return {"parts": [{"name": "correctness_router", **settings}]}


def read(student: Policy, teacher: Policy, rows: Sequence[Rollout], **config: Any) -> Signal:
    method = built(student, **config)
    return method.read(rows, [scored(teacher, query) for query in method.audit(rows, 1)], 1)


def taught(student: Policy, rows: Sequence[Rollout], method: Method, signal: Signal) -> tuple[float, list[Tensor]]:
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    loss = trainer.accumulate(rows, signal)["loss"]
    return loss, [p.grad.clone() for p in student.model.parameters() if p.grad is not None]


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(("tau", "of_right", "of_wrong"), GOLDEN)
def test_golden_weights_of_the_papers_figure(tau: float, of_right: list[float], of_wrong: list[float]) -> None:
    assert group_weights(-RIGHT.log(), tau, HIGH, "one").tolist() == pytest.approx(of_right, abs=5e-5)
    assert group_weights(-WRONG.log(), tau, LOW, "one").tolist() == pytest.approx(of_wrong, abs=5e-5)


def test_the_released_students_direction_is_the_other_one() -> None:
    released = [1.6879, 0.7790, 0.5330]

    assert group_weights(-RIGHT.log(), 1.0, LOW, "count").tolist() == pytest.approx(released, abs=5e-5)
    assert group_weights(-RIGHT.log(), 1.0, HIGH, "count").tolist() == pytest.approx([0.4737, 1.0263, 1.5], abs=5e-5)


def test_limits_of_the_temperature_and_the_scale_of_perplexity() -> None:
    weights = group_weights(-RIGHT.log(), 1.0, HIGH, "one")

    assert group_weights(-RIGHT.log(), math.inf, HIGH, "one").tolist() == pytest.approx([1 / 3] * 3)
    assert group_weights(-RIGHT.log(), 1e-3, HIGH, "one").tolist() == pytest.approx([0, 0, 1])
    torch.testing.assert_close(group_weights(-(7 * RIGHT).log(), 1.0, HIGH, "one"), weights)
    of_wrong = group_weights(-WRONG.log(), 0.5, LOW, "one")
    torch.testing.assert_close(group_weights(-(7 * WRONG).log(), 0.5, LOW, "one"), of_wrong)


@pytest.mark.parametrize("tau", [1.0, math.inf])
def test_what_the_teacher_rules_out_weighs_nothing_unless_all_of_it_does(tau: float) -> None:
    inf = math.inf
    assert group_weights(torch.tensor([-1.0, -inf, -1.0]), tau, LOW, "one").tolist() == [0.5, 0, 0.5]
    assert group_weights(torch.tensor([-inf, -inf]), tau, LOW, "one").tolist() == [0.5, 0.5]
    assert group_weights(torch.tensor([-2.0]), tau, LOW, "one").tolist() == [1]


# ------------------------------------------------------------------ routing


def test_right_rollouts_are_likelihood_wrong_ones_distillation(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, "+-" + "++" + "--")
    plain = read(student, teacher, rows, parts=[])
    signal = read(student, teacher, rows)
    own = [torch.tensor(rows[row].logprobs, dtype=torch.float64).mean() for row in (2, 3)]
    likelier = group_weights(torch.stack(own), 1.0, HIGH, "one")

    assert signal.values_BT[0].tolist() == [1.0] * len(rows[0])  # alone in its branch, as is the next
    assert torch.equal(signal.values_BT[1], plain.values_BT[1])
    for row, weight in zip((2, 3), likelier.tolist(), strict=True):
        assert signal.values_BT[row].tolist() == pytest.approx([weight] * len(rows[row]))
    shares = [(signal.values_BT[row] / plain.values_BT[row]).mean().item() for row in (4, 5)]
    assert sum(shares) == pytest.approx(1) and shares[0] != pytest.approx(shares[1])
    assert [signal.stats[name] for name in ("routed_right", "routed_wrong", "unrouted")] == [3, 3, 0]
    assert signal.coverage == 1


def test_one_wrong_rollout_of_eight_weighs_as_much_as_eight(student: Policy, teacher: Policy) -> None:
    for marks, total in (("+++++++-", 1), ("--------", 1)):
        rows = rows_of(student, marks, group=8)
        plain, signal = read(student, teacher, rows, parts=[]), read(student, teacher, rows)
        wrong = [row for row, mark in enumerate(marks) if mark == "-"]
        weights = [float((signal.values_BT[row] / plain.values_BT[row]).mean()) for row in wrong]
        assert sum(weights) == pytest.approx(total)


@pytest.mark.parametrize(("branch", "marks"), [("student", "+++"), ("teacher", "---")])
def test_either_direction_can_be_turned_by_its_word(student: Policy, teacher: Policy, branch: str, marks: str) -> None:
    rows = rows_of(student, marks, group=3)
    plain = read(student, teacher, rows, parts=[])
    found = {way: read(student, teacher, rows, **routed(**{branch: way})).values_BT for way in (HIGH, LOW)}
    if branch == "student":
        means = [sum(row.logprobs) / len(row) for row in rows]
        weights = {way: [float(values[0]) for values in of] for way, of in found.items()}
    else:
        said = [p.double() + torch.tensor(row.logprobs) for p, row in zip(plain.values_BT, rows, strict=True)]
        means = [float(logq.mean()) for logq in said]
        weights = {
            way: [float((a / b).mean()) for a, b in zip(of, plain.values_BT, strict=True)] for way, of in found.items()
        }
    order = sorted(range(3), key=lambda row: means[row])  # the highest perplexity first
    assert [weights[HIGH][row] for row in order] == sorted(weights[HIGH], reverse=True)
    assert [weights[LOW][row] for row in order] == sorted(weights[LOW])


def test_the_placebo_deals_the_weights_of_a_branch_to_others_of_it(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, "++++---+", group=8)
    plain, real = read(student, teacher, rows, parts=[]), read(student, teacher, rows)
    method = built(student, **routed(placebo="random"))
    scores = [scored(teacher, query) for query in method.audit(rows, 1)]
    dealt = {step: method.read(rows, scores, step) for step in range(1, 9)}
    right, wrong = (0, 1, 2, 3, 7), (4, 5, 6)

    def weights(signal: Signal) -> tuple[list[float], list[float]]:
        own = [float(signal.values_BT[row][0]) for row in right]
        return own, [float((signal.values_BT[row] / plain.values_BT[row]).mean()) for row in wrong]

    for signal in dealt.values():
        for mine, others in zip(weights(signal), weights(real), strict=True):
            assert sorted(mine) == pytest.approx(sorted(others), rel=1e-5)
    for branch in (0, 1):
        assert len({tuple(round(one, 4) for one in weights(signal)[branch]) for signal in dealt.values()}) > 2
    again = method.read(rows, scores, 1)
    assert all(torch.equal(a, b) for a, b in zip(again.values_BT, dealt[1].values_BT, strict=True))


def test_the_teacher_is_not_asked_about_right_rollouts(student: Policy) -> None:
    asked = built(student).audit(rows_of(student, "+-++"), 1)

    assert [query.row for query in asked] == [1]


def test_the_control_asks_about_all_since_verdicts_are_dealt_out(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, "+---")
    asked = built(student, control="shuffled").audit(rows, 1)
    signal = read(student, teacher, rows, control="shuffled")

    assert [query.row for query in asked] == [0, 1, 2, 3]
    assert sum(len(set(values.tolist())) == 1 for values in signal.values_BT) == 1  # one of them is called right


def test_what_has_no_verdict_is_plain_and_counted(
    student: Policy, teacher: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(student, "?|+|")
    with caplog.at_level(logging.WARNING):
        signal = read(student, teacher, rows)
    plain = read(student, teacher, rows, parts=[])

    for row in (0, 1, 3):
        assert torch.equal(signal.values_BT[row], plain.values_BT[row])
    assert (signal.stats["unrouted"], signal.stats["verdict_share"]) == (3, 0.25)
    assert "75% of the rollouts have no verdict" in caplog.text


def test_another_prompts_rollouts_change_no_weight(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, "+--+++--", group=4)
    again = [replace(row, prompt=replace(row.prompt, id="other")) for row in rows[4:]]
    signal, more = read(student, teacher, rows), read(student, teacher, [*rows, *again])

    assert all(torch.equal(one, other) for one, other in zip(signal.values_BT, more.values_BT, strict=False))


def test_the_order_of_rows_changes_nothing(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, "+--+-+--", group=4)
    there = read(student, teacher, rows).values_BT
    back = read(student, teacher, rows[::-1]).values_BT

    for one, other in zip(there, back[::-1], strict=True):
        torch.testing.assert_close(one, other)


def test_a_teacher_that_rules_tokens_out_leaves_no_hole_in_the_weights(
    student: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(student, "----")
    method = built(student)

    def logprob(row: int, t: int) -> float:
        return -math.inf if t == 0 and row in (0, 2, 3) else -1.0

    with caplog.at_level(logging.WARNING):
        signal = method.read(rows, scores_of(method.audit(rows, 1), logprob), 1)
    weights = [(values[1] / (-1 - row.logprobs[1])).item() for values, row in zip(signal.values_BT, rows, strict=True)]

    assert weights == pytest.approx([0, 1, 0.5, 0.5])
    assert all(values.isfinite().all() for values in signal.values_BT)
    assert "every wrong rollout of 1 prompts" in caplog.text


def test_with_a_filter_only_wrong_rollouts_are_dropped(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, "++--")
    parts = ["correctness_router", {"name": "trajectory_filter", "drop": 0.5}, {"name": "whiten"}]
    method = built(student, parts=parts)
    scores = [scored(teacher, query) for query in built(student, parts=[]).audit(rows, 1)]  # of all four
    signal = method.read(rows, scores, 1)
    routed = read(student, teacher, rows)
    assert all(torch.equal(signal.values_BT[row], routed.values_BT[row]) for row in (0, 1))

    assert [bool(mask.any()) for mask in signal.mask_BT][:2] == [True, True]
    assert sum(bool(mask.any()) for mask in signal.mask_BT[2:]) == 1
    assert any("trajectory_filter" in note for note in method.cautions())


# ------------------------------------------------------------------ the real update


@pytest.mark.parametrize("reduction", ["sum_seqmean", "term_mean"])
def test_everything_wrong_tau_inf_and_sum_to_count_is_plain_to_the_last_bit(
    student: Policy, teacher: Policy, reduction: str
) -> None:
    rows = rows_of(student, "---" * 3, group=3)
    settings = {"reduction": reduction}
    method = built(student, **settings, **routed(tau=math.inf, sum_to="count"))
    signal = read(student, teacher, rows, **settings, **routed(tau=math.inf, sum_to="count"))
    loss, gradients = taught(student, rows, method, signal)
    plain = built(student, **settings, name="opd")
    expected, of_plain = taught(student, rows, plain, read(student, teacher, rows, **settings, name="opd"))

    assert loss == expected != 0
    assert all(torch.equal(one, other) for one, other in zip(gradients, of_plain, strict=True))


def test_no_share_of_a_count_is_multiplied_up_again(student: Policy) -> None:
    """49 times 1/49 is not 1 in float64, nor 41, 47, 55 times theirs in float32: tau=inf has to be the constant 1."""
    assert 49 * (1 / 49) != 1
    ones = torch.ones(())
    assert [n for n in range(1, 56) if n * (ones / n) != 1] == [41, 47, 55]
    rows = rows_of(student, "-" * 49, group=49)
    plain, signal = (
        method.read(rows, scores_of(method.audit(rows, 1), lambda row, t: -1.0 - row / 7 - t / 3), 1)
        for method in (built(student, name="opd"), built(student, **routed(tau=math.inf, sum_to="count")))
    )
    assert all(torch.equal(one, other) for one, other in zip(plain.values_BT, signal.values_BT, strict=True))
    assert "weight_mean" not in signal.stats  # left out, not multiplied with 1


def test_the_loss_is_equation_six(student: Policy, teacher: Policy) -> None:
    """Sums over tokens, both branches' weights adding up to 1 per prompt; over the rollouts of the step [ours]."""
    rows = rows_of(student, "+-+-" + "---+", group=4)
    method = built(student)
    signal = read(student, teacher, rows)
    loss, _ = taught(student, rows, method, signal)
    total = 0.0
    for group in ((0, 1, 2, 3), (4, 5, 6, 7)):
        logp = {row: tiny.dense(student.model, rows[row].prompt_ids, rows[row].ids)[0].double() for row in group}
        logq = {row: tiny.dense(teacher.model, rows[row].prompt_ids, rows[row].ids)[0].double() for row in group}
        for sides, sign, marks in ((logp, -1, (0, 2, 7)), (logq, 1, (1, 3, 4, 5, 6))):
            branch = [row for row in group if row in marks]
            weights = torch.stack([sign * sides[row].mean() for row in branch]).softmax(0)
            for row, weight in zip(branch, weights.tolist(), strict=True):
                ratio = torch.ones_like(logp[row]) if sign < 0 else logq[row] - logp[row]
                total += weight * float((-ratio * logp[row]).sum())
    assert loss == pytest.approx(total / len(rows), rel=1e-4)


@pytest.mark.parametrize("marks", ["+", "-"])
def test_a_group_of_one_token_alone_weighs_one(student: Policy, teacher: Policy, marks: str) -> None:
    (row,) = rows_of(student, marks, group=1)
    (row,) = [replace(tiny.rollout(student, [student.end_id], row.prompt, "stop"), text=row.text)]
    method, signal = built(student), read(student, teacher, [row])
    plain = read(student, teacher, [row], parts=[])
    assert torch.equal(signal.values_BT[0], torch.ones(1) if marks == "+" else plain.values_BT[0])
    assert math.isfinite(taught(student, [row], method, signal)[0])


@pytest.mark.parametrize("form", ["sampled", "dense"])
def test_all_right_is_likelihood_of_the_students_own_text_without_any_teacher(student: Policy, form: str) -> None:
    rows = rows_of(student, "+", group=1)
    method = built(student, form=form)
    assert method.audit(rows, 1) == []

    signal = method.read(rows, [], 1)
    loss, gradients = taught(student, rows, method, signal)
    student.model.zero_grad()
    whole = torch.tensor([[*rows[0].prompt_ids, *rows[0].ids]])
    logp = student.model(input_ids=whole).logits[0, len(rows[0].prompt_ids) - 1 : -1].log_softmax(-1)
    nll = -logp.gather(1, torch.tensor(rows[0].ids)[:, None]).sum()
    nll.backward()

    assert signal.coverage == 1
    assert loss == pytest.approx(nll.item(), rel=1e-5)
    for one, other in zip(gradients, [p.grad for p in student.model.parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_dense_form_keeps_divergences_on_wrong_rollouts_alone(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, "+-")
    asked = built(student, form="dense", parts=[]).audit(rows, 1)  # about both
    signal = built(student, form="dense").read(rows, [scored(teacher, query) for query in asked], 1)

    assert [target is None for target in signal.targets] == [True, False]
    assert signal.values_BT[0].tolist() == [1.0] * len(rows[0])
    assert not signal.values_BT[1].any()
